"""Without the libraries that only some of it needs: what needs none of them runs, the rest says in a line what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import versions
from eqldm.anagram.animation import check_writable
from eqldm.evaluation.features import inception_features

ROOT = Path(__file__).parents[1]
OPTIONAL = ("av", "torch_fidelity", "deepspeed", "gradio", "playwright", "datasets", "resvg_py")


@pytest.mark.slow
def test_training_sampling_and_the_tests_fixtures_import_without_them():
    code = f"""
import sys
import torchmetrics.image.fid  # before: it looks at what pip has installed, and not at what can be imported
sys.modules.update(dict.fromkeys({OPTIONAL}))
import train, sample, conftest, steps
import eqldm.sample, eqldm.evaluate, eqldm.studio, eqldm.anagram.preview, eqldm.autoencoder.module, eqldm.diffusion.module
import eqldm.evaluation.judge_training, eqldm.evaluation.monitor, eqldm.export, eqldm.budget
"""
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'benchmarks'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def without(monkeypatch):
    for name in OPTIONAL:
        for module in [known for known in sys.modules if known.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)


def test_films_and_distances_say_what_they_need(without, tmp_path):
    with pytest.raises(ValueError, match="animation 'mp4' needs PyAV, which is not installed: pip install av, or take gif or webp"):
        check_writable("mp4")
    check_writable("gif")
    with pytest.raises(ValueError, match="need torch-fidelity, which is not installed: pip install torch-fidelity"):
        inception_features(tmp_path / "weights.pth")


def test_the_report_of_versions_names_what_is_not_there(monkeypatch):
    def version(name: str) -> str:
        if name == "av":
            raise versions.PackageNotFoundError(name)
        return versions.locked()[name]

    monkeypatch.setattr(versions, "version", version)
    assert versions.differences() == [("av", versions.locked()["av"], "none")]
