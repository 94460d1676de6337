"""A run that is told to stop, it and its reader processes, at any moment: it saves or says what to do, and goes on as if nothing was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eqldm.training.metrics_log import TABLE, read_metrics
from eqldm.training.stopping import INTERRUPTED, STOPPED
from runs import weights

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PLACES = {  # where the run sends the signal to its own group, by the words for the moment
    "the readers' start": "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter.__init__",
    "the start of the training": "eqldm.training.callbacks:SaveLast.on_train_start",
    "a step": "eqldm.autoencoder.module:Autoencoder.training_step",
    "a validation": "eqldm.autoencoder.module:Autoencoder.validation_step",
    "the writing of a checkpoint": "torch:save",
    "the last step's end": "eqldm.training.averaging:EMA.on_fit_end",
    "the export": "eqldm.autoencoder.module:export_autoencoder",
}


def start(options: Path, run: Path, place: str = "", call: int = 1, number: int = 0) -> subprocess.Popen:
    """A run of its own process group, which has the signal sent to that at so many calls of the place, by another process: readers obey
    their own."""
    module, _, path = place.partition(":")
    tell = (
        f"owner = importlib.import_module({module!r})\n"
        f"*within, name = {path!r}.split('.')\n"
        "for part in within:\n"
        "    owner = getattr(owner, part)\n"
        f"whole, left = getattr(owner, name), [{call}]\n"
        "def told(*args, **options):\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0:\n"
        f"        sender = [sys.executable, '-ISc', 'import os; os.killpg(0, {number:d})']\n"
        "        threading.Timer(0.01, subprocess.run, (sender,), dict(stderr=subprocess.DEVNULL)).start()\n"
        "    return whole(*args, **options)\n"
        "setattr(owner, name, told)\n"
    )
    script = run.parent / "told.py"
    script.write_text(
        f"import importlib, runpy, subprocess, sys, threading\n{tell if place else ''}"
        f"sys.argv = ['train.py', {str(options)!r}, 'run.dir={run}']\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


@pytest.fixture(scope="module")
def whole(make_picture_shards, write_tiny_options, tmp_path_factory) -> tuple[Path, float]:
    """A folder with options of twelve steps and their run that nothing stopped, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    shards = make_picture_shards(folder / "shards", count=8, size=16)
    options = write_tiny_options(folder / "tiny.yaml", shards, num_steps=12, checkpoint_every=5, val_every=4)
    options.write_text(options.read_text().replace("num_workers: 0", "num_workers: 2"))
    begun = time.monotonic()
    process = start(options, folder / "run")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder, time.monotonic() - begun


def check(folder: Path, run: Path, process: subprocess.Popen, number: signal.Signals) -> None:
    """It ended as told, or was done; the same command ends as the run that nothing stopped."""
    output, _ = process.communicate(timeout=300)
    expected = INTERRUPTED if number == signal.SIGINT else STOPPED
    assert process.returncode in (expected, 0), output
    assert "Traceback" not in output and "DataLoader worker" not in output and "make room" not in output, output
    if process.returncode:
        assert f"stopped by {number.name}" in output, output
        process = start(folder / "tiny.yaml", run)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    a, b = weights(run / "model", "vae"), weights(folder / "run" / "model", "vae")
    assert all((a[name] == b[name]).all() for name in b)
    for name in ("train/loss", "val/reconstruction/psnr"):
        found = [[(row["step"], row[name]) for row in read_metrics(each / TABLE).whole if row[name]] for each in (run, folder / "run")]
        assert found[0] == found[1] != []


@pytest.mark.fault("SIGTERM, SIGUSR1 or Ctrl-C to a run and its readers, at a random moment", tries=3)
def test_at_a_random_moment(whole, tmp_path, seed):
    folder, seconds = whole
    number = SIGNALS[seed % 3]
    process = start(folder / "tiny.yaml", tmp_path / "run")
    time.sleep(seconds * random.Random(seed).uniform(0.35, 1.0))  # before, Python starts, where a signal ends any process
    if process.poll() is None:
        os.killpg(process.pid, number)
    check(folder, tmp_path / "run", process, number)


@pytest.mark.parametrize("moment", PLACES)
@pytest.mark.fault("SIGTERM, SIGUSR1 or Ctrl-C to a run and its readers, within a certain work", tries=1)
def test_within(whole, tmp_path, moment, seed):
    draw = random.Random(f"{moment} {seed}")
    number, often = draw.choice(SIGNALS), moment in ("a step", "a validation", "the writing of a checkpoint", "the readers' start")
    process = start(whole[0] / "tiny.yaml", tmp_path / "run", PLACES[moment], draw.randint(1, 2) if often else 1, number)
    check(whole[0], tmp_path / "run", process, number)
