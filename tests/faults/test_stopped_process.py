"""One of two processes that train together stands still: the other says which, at which step, and ends when its time is over."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eqldm.training.checkpoints import LAST, checkpoint_step
from eqldm.training.heartbeat import FOLDER

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.mark.fault("one of two processes that train together is stopped", tries=2)
def test_a_process_that_stands_still_is_named(make_picture_shards, write_tiny_options, tmp_path, seed):
    rank = seed % 2
    options = write_tiny_options(
        tmp_path / "tiny.yaml", make_picture_shards(tmp_path / "shards", count=8, size=16), num_steps=100_000, checkpoint_every=20
    )
    words = [sys.executable, "train.py", options, "run.devices=2", "run.timeout_seconds=45", "run.val_every=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "output", "w") as file:
        main = subprocess.Popen(list(map(str, words)), cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    beats = [tmp_path / "run" / FOLDER / f"rank-{each}.json" for each in (0, 1)]
    limit = time.monotonic() + 240
    while not (all(beat.is_file() for beat in beats) and (tmp_path / "run" / LAST).exists()) and time.monotonic() < limit:
        time.sleep(0.2)
        assert main.poll() is None, (tmp_path / "output").read_text()
    time.sleep(3)  # a beat of each
    pids = [json.loads(beat.read_text())["pid"] for beat in beats]
    os.kill(pids[rank], signal.SIGSTOP)
    try:
        limit = time.monotonic() + 150
        while alive(pids[1 - rank], main) and time.monotonic() < limit:
            time.sleep(0.2)
        assert not alive(pids[1 - rank], main), (tmp_path / "output").read_text()
    finally:
        os.killpg(main.pid, signal.SIGKILL)
    output = (tmp_path / "output").read_text()
    named = re.search(rf"process {rank} \(pid {pids[rank]} on \S+\) was last seen (\d+) s ago, at step (\d+), (training|saving)", output)
    ended = re.search(rf"error: process {1 - rank} waited in vain for the others at step (\d+)", output)
    assert named and ended and 0 < int(named[2]) <= int(ended[1]) >= checkpoint_step(tmp_path / "run" / LAST), output


def alive(pid: int, main: subprocess.Popen) -> bool:
    if main.pid == pid:
        return main.poll() is None
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
