"""An evaluation that is killed goes on with what it had, and finds the same."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SIZES = ["--num-images", "8", "--num-letters", "8", "--num-pairs", "8", "--num-inference-steps", "4", "--batch-size", "2"]


def evaluation(model: Path, data: Path, out: Path) -> list[str]:
    models = [f"a={model}", f"b={model}@guidance_scale=3"]
    asked = ["--without", "lpips", "--metrics", "reconstruction", "equivariance", "generation", "anagram"]
    command = [sys.executable, "-m", "eqldm.evaluate", *models, "--data", str(data), "--out", str(out), "--device", "cpu"]
    return [*command, *asked, "--precision", "32-true", *SIZES]


def figures(out: Path) -> dict[str, dict[str, float]]:
    return {name: json.loads((out / name / "metrics.json").read_text()) for name in ("a", "b")}


@pytest.fixture(scope="module")
def whole(tiny_model_folder, tmp_path_factory, make_picture_shards):
    """(data, the figures of an evaluation that nothing stopped, its seconds)"""
    folder = tmp_path_factory.mktemp("evaluation")
    data = make_picture_shards(folder / "data", count=8, caption="the letter a")
    begun = time.monotonic()
    subprocess.run(evaluation(tiny_model_folder, data, folder / "out"), check=True, capture_output=True, env=environment())
    return data, figures(folder / "out"), time.monotonic() - begun


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.fault("evaluation killed at random moments", tries=4)
def test_kill(tiny_model_folder, tmp_path, whole, seed):
    data, wanted, seconds = whole
    drawn = random.Random(seed)
    for _ in range(2):
        process = subprocess.Popen(
            evaluation(tiny_model_folder, data, tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
        )
        try:
            process.wait(timeout=drawn.uniform(0.3, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    done = subprocess.run(
        evaluation(tiny_model_folder, data, tmp_path / "out"), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert figures(tmp_path / "out") == wanted
    assert (tmp_path / "out" / "report.html").read_text().rstrip().endswith("</html>")
