"""The jobs of slurm/ on a real Slurm of two nodes, started on this machine by cluster.sh: CPU nodes, gloo.

Skipped, saying why, where Slurm or munge is not installed: `apt-get install slurm-wlm munge`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eqldm.model_folder import load_unet, load_vae
from eqldm.training.run_folder import LAST

ROOT = Path(__file__).parents[2]
MISSING = [program for program in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(program) is None]
SHORT = ["--cpus-per-task=1"]
TRAIN = ["--nodes=2", "--ntasks-per-node=1", *SHORT, "slurm/train.sbatch"]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt-get install slurm-wlm munge)"),
    pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="slurmd wants root"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """SLURM_CONF of a running cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    script = ["bash", str(Path(__file__).parent / "cluster.sh")]
    started = subprocess.run([*script, "start", folder], capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stderr
        yield {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([*script, "stop", folder], check=True)


class Job:
    """A submitted job. log: its own; rank(r): that of a task."""

    def __init__(self, environment: dict[str, str], folder: Path, words: list, **variables):
        self.environment = {**os.environ, **environment, "PY": sys.executable, "LOGS": str(folder / "logs"), "OMP_NUM_THREADS": "1"}
        self.environment |= {name: str(value) for name, value in variables.items()}
        self.folder = folder
        done = self.call("sbatch", "--parsable", f"--output={folder}/%x-%A.log", *words)
        self.number = done.split(";")[0].strip()

    def call(self, *words) -> str:
        done = subprocess.run(list(map(str, words)), env=self.environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def about(self, name: str) -> str:
        return re.search(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", "-o", self.number))[1]

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*-{self.number}.log")))

    def rank(self, r: int) -> str:
        return "".join(path.read_text() for path in self.folder.glob(f"logs/*-{self.number}/{r}.log"))

    def wait(self, what: Callable[[], bool], seconds: int = 180) -> None:
        limit = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < limit, f"{self.call('scontrol', 'show', 'job', self.number)}\n{self.log}\n{self.rank(0)}"
            time.sleep(0.2)

    def ended(self) -> bool:
        return self.about("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture
def tiny(make_picture_shards, write_tiny_options, tmp_path) -> Path:
    """A config of a tiny run in `tmp_path / "run"`; a step takes some milliseconds."""
    shards = make_picture_shards(tmp_path / "shards", count=12, size=16)
    return write_tiny_options(tmp_path / "tiny.yaml", shards, num_steps=1000, val_every=10000, checkpoint_every=50)


def last_step(text: str) -> int:
    """The last step that a log of rank 0 tells of."""
    return max([int(step) for step in re.findall(r"^step (\d+)/", text, re.M)], default=0)


def test_a_job_that_is_told_that_time_is_up_and_then_requeued_loses_nothing(slurm, tiny, tmp_path):
    job = Job(slurm, tmp_path, [*TRAIN, tiny, "data.num_workers=1"])  # a reader, which the signal reaches as well
    job.wait(lambda: last_step(job.rank(0)) >= 60)
    job.call("scancel", "--signal=USR1", job.number)  # to the tasks, as --signal=USR1@300 does before the limit
    job.wait(lambda: "with a checkpoint: the same command goes on" in job.rank(0))
    stopped = int(re.search(r"stopped by SIGUSR1 at step (\d+)", job.rank(0))[1])
    job.wait(lambda: last_step(job.rank(0)) >= stopped + 60)
    assert job.about("Restarts") == "1" and "stopped to go on later; the job is RUNNING" in job.log
    assert f"step {stopped + 1}/1000" in job.rank(0)  # it went on where it was
    job.call("scontrol", "requeue", job.number)
    job.wait(job.ended, 300)
    assert (job.about("JobState"), job.about("Restarts")) == ("COMPLETED", "2"), job.log
    assert f"done: {tmp_path / 'run' / 'model'}" in job.rank(0)
    assert job.log.count("tasks on n[1-2]") == 3

    command = [sys.executable, "train.py", tiny, f"run.dir={tmp_path / 'whole'}", "run.devices=2"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    a, b = (load_vae(tmp_path / name / "model").state_dict() for name in ("run", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_at_its_time_limit_a_job_saves_requeues_itself_and_goes_on(slurm, tiny, tmp_path):
    """Slurm's own warning, before a limit of a minute."""
    steps = 10**6
    job = Job(
        slurm, tmp_path, ["--time=1", "--signal=USR1@20", *TRAIN, tiny, f"run.num_steps={steps}", "run.log_every=1", "data.num_workers=1"]
    )
    job.wait(lambda: "stopped by SIGUSR1" in job.rank(0), 120)
    stopped = int(re.search(r"stopped by SIGUSR1 at step (\d+), with a checkpoint", job.rank(0))[1])
    job.wait(lambda: f"step {stopped + 1}/{steps}" in job.rank(0))
    assert job.about("Restarts") == "1" and "stopped to go on later; the job is RUNNING" in job.log
    assert job.rank(0).count(f"step {stopped + 1}/{steps}") == 1  # no step was lost, none was taken twice
    job.call("scancel", job.number)
    job.wait(job.ended)


def test_zero_on_two_nodes(slurm, tiny_pictures, tiny_model_folder, write_tiny_unet_options, tmp_path):
    options = write_tiny_unet_options(tmp_path / "unet.yaml", tiny_pictures, tiny_model_folder, num_steps=3, strategy="zero2")
    job = Job(slurm, tmp_path, [*TRAIN, options])
    job.wait(job.ended, 300)
    assert job.about("JobState") == "COMPLETED", job.log
    about = json.loads((tmp_path / "run" / LAST / "about.json").read_text())
    assert (about["global_step"], about["processes"]) == (3, 2)
    load_unet(tmp_path / "run" / "model")


def test_a_killed_rank_ends_the_job_with_its_reason(slurm, tiny, tmp_path):
    job = Job(slurm, tmp_path, [*TRAIN, tiny])
    job.wait(lambda: last_step(job.rank(0)) >= 60)
    tasks = subprocess.run(["pgrep", "-f", f"train.py {tiny}"], capture_output=True, text=True, check=True).stdout.split()
    ranks = {
        dict(item.split("=", 1) for item in Path(f"/proc/{task}/environ").read_text().split("\0") if "=" in item).get("SLURM_PROCID"): task
        for task in tasks
        if "srun" not in Path(f"/proc/{task}/cmdline").read_text()
    }
    os.kill(int(ranks["1"]), signal.SIGKILL)
    job.wait(job.ended)
    assert job.about("JobState") == "FAILED"
    assert "error: a task failed" in job.log and "submit the same job again to go on" in job.log and "Killed" in job.log
    again = Job(slurm, tmp_path, [*TRAIN, tiny, "run.log_every=500"])
    again.wait(again.ended)
    assert again.about("JobState") == "COMPLETED", again.log


def test_a_cancelled_job_stays_cancelled(slurm, tiny, tmp_path):
    job = Job(slurm, tmp_path, [*TRAIN, tiny, "run.num_steps=100000"])
    job.wait(lambda: last_step(job.rank(0)) >= 1)
    job.call("scancel", job.number)
    job.wait(job.ended)
    job.wait(lambda: "with a checkpoint" in job.rank(0))
    time.sleep(3)
    assert job.about("JobState") == "CANCELLED" and job.about("Restarts") == "0"


def test_encoding_then_evaluating(slurm, tiny_model_folder, make_picture_shards, tmp_path):
    shards = make_picture_shards(tmp_path / "pictures", count=12, size=32)
    job = Job(slurm, tmp_path, ["--nodes=2", "--ntasks-per-node=1", *SHORT, "slurm/encode.sbatch", "--data", shards, "--model",
                                tiny_model_folder, "--out", tmp_path / "latents", "--num-workers", 0])  # fmt: skip
    few = [
        "--num-images",
        4,
        "--num-letters",
        4,
        "--num-pairs",
        4,
        "--num-inference-steps",
        2,
        "--batch-size",
        2,
        "--without",
        "lpips",
        "inception",
        "clip",
        "--metrics",
        "reconstruction",
        "fit",
        "generation",
    ]
    evaluation = Job(slurm, tmp_path, [f"--dependency=afterok:{job.number}", "--nodes=2", "--ntasks-per-node=1", *SHORT,
                                       "slurm/evaluate.sbatch", tiny_model_folder, "--data", shards, "--out", tmp_path / "evaluation",
                                       *few])  # fmt: skip
    evaluation.wait(evaluation.ended)
    assert json.loads((tmp_path / "latents" / "manifest.json").read_text())["count"] == 12
    assert all("latents in" in job.rank(r) for r in (0, 1))
    assert (tmp_path / "evaluation" / "report.html").is_file(), evaluation.log
    assert any("report:" in evaluation.rank(r) for r in (0, 1))


def test_an_array_makes_each_seed_once(slurm, tiny_model_folder, tmp_path):
    words = ["--array=0-2", *SHORT, "slurm/sample_array.sbatch", "--model", tiny_model_folder, "--prompts", "the letter a", "the letter v"]
    job = Job(slurm, tmp_path, [*words, "--num-inference-steps", 1], PER=2, OUT=tmp_path / "anagrams")
    wanted = [str(seed) for seed in range(6)]
    made = lambda: sorted(path.stem for path in (tmp_path / "anagrams").rglob("*.json"))  # noqa: E731
    job.wait(lambda: len(list((tmp_path / "anagrams").glob("*/sheet.png"))) == 3)
    assert made() == wanted


def test_what_is_missing_is_said(slurm, tiny, tmp_path):
    job = Job(slurm, tmp_path, [*TRAIN, tiny], PY="/nowhere/python")
    job.wait(job.ended)
    assert job.about("JobState") == "FAILED" and "error: no Python at '/nowhere/python': run make setup" in job.log
    job = Job(slurm, tmp_path, ["--array=0", *SHORT, "slurm/sample_array.sbatch"])
    job.wait(job.ended)
    assert "give the seeds of each task: PER=64" in job.log
