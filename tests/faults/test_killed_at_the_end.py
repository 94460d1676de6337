"""A run that is killed late, after its last checkpoint, loses neither rows of its log nor the metrics on its model's card."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eqldm.training.metrics_log import TABLE, read_metrics
from runs import weights

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
# Where the process kills itself: at each of these, the one of all calls that the seed says
PLACES = (
    "eqldm.autoencoder.module.export_autoencoder",
    "eqldm.training.averaging.EMA.on_fit_end",
    "eqldm.autoencoder.module.Autoencoder.validation_step",
    "eqldm.training.callbacks.SaveLast._save",
    "eqldm.training.callbacks.SaveLast.on_train_end",
    "eqldm.training.callbacks.SaveLast.on_train_batch_start",
)


def train(options: Path, run: Path, place: str | None = None, call: int = 1) -> subprocess.CompletedProcess:
    script = run.parent / "killed.py"
    owner, _, name = (place or "").rpartition(".")
    module, _, kind = owner.rpartition(".") if owner.rsplit(".", 1)[-1][:1].isupper() else (owner, "", "")
    script.write_text(
        "import importlib, os, runpy, signal, sys\n"
        f"owner = importlib.import_module({module!r})\n"
        f"owner = getattr(owner, {kind!r}) if {kind!r} else owner\n"
        f"whole, left = getattr(owner, {name!r}), [{call}]\n"
        "def killed(*args, **options):\n"
        "    left[0] -= 1\n"
        "    return whole(*args, **options) if left[0] else os.kill(os.getpid(), signal.SIGKILL)\n"
        f"setattr(owner, {name!r}, killed)\n"
        f"sys.argv = ['train.py', {str(options)!r}, 'run.dir={run}']\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        if place
        else f"import runpy, sys\nsys.argv = ['train.py', {str(options)!r}, 'run.dir={run}']\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)


def told(run: Path) -> tuple[list[str], list]:
    """The metrics on a run's card, and its log, but for times and for what is counted from a start on."""
    values = {
        (int(row["step"]), name, value)
        for row in read_metrics(run / TABLE).whole
        for name, value in row.items()
        if value and "per_second" not in name and name != "data/skipped"
    }
    card = re.findall(r"^.*`val/.*$", (run / "model" / "README.md").read_text(), re.MULTILINE)
    assert card
    return card, sorted(values)


@pytest.fixture(scope="module")
def whole(make_picture_shards, write_tiny_options, tmp_path_factory) -> Path:
    """A folder with options of six steps, and their run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    shards = make_picture_shards(folder / "shards", count=8, size=16)
    options = write_tiny_options(folder / "tiny.yaml", shards, num_steps=6, checkpoint_every=2, val_every=3)
    assert train(options, folder / "run").returncode == 0
    return folder


@pytest.mark.fault("training killed after its last checkpoint, or about one", tries=len(PLACES))
def test_killed(whole, tmp_path, seed):
    place, call = PLACES[seed % len(PLACES)], 1 + seed // len(PLACES)
    done = train(whole / "tiny.yaml", tmp_path / "run", place, call)
    assert done.returncode in (-signal.SIGKILL, 0), done.stderr[-3000:]
    done = train(whole / "tiny.yaml", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert told(tmp_path / "run") == told(whole / "run")
    mine, its = weights(tmp_path / "run" / "model", "vae"), weights(whole / "run" / "model", "vae")
    assert all((mine[name] == its[name]).all() for name in its)
