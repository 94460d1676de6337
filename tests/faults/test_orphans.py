"""The parent of worker processes is killed: they end with it, and the same command makes what an uninterrupted one makes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import contents

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="lists processes by /proc")]


@pytest.fixture(scope="module")
def commands(tmp_path_factory, make_picture_shards, make_model_folder) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("sources")
    shards, model = make_picture_shards(folder / "shards", count=240, size=64, shard_size=8), make_model_folder(folder / "model")
    return {
        "glyphs": ["glyphs.py", "--split", "train", "--num-train", 1500, "--shard-size", 50, "--workers", 2],
        "make_shards": ["make_shards.py", "--tars", shards, "--size", 48, "--format", "png", "--workers", 2],
        "encode_latents": ["encode_latents.py", "--data", shards, "--model", model, "--batch-size", 4, "--num-workers", 2],
    }


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What each command makes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    for name, command in commands.items():
        process = start(command, folder / name)
        assert process.communicate(timeout=300) and process.returncode == 0
    return {name: contents(folder / name) for name in commands}


def start(command: list, out: Path) -> subprocess.Popen:
    words = [sys.executable, str(ROOT / "data" / command[0]), *map(str, command[1:]), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)


def processes_of(session: int) -> list[int]:
    """Those of a session, but for zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("name", ["glyphs", "make_shards", "encode_latents"])
@pytest.mark.fault("the parent of worker processes killed at a random moment (SIGTERM, SIGKILL)", tries=2)
def test_workers_end_with_their_parent(commands, whole, tmp_path, name, seed):
    rng, number = random.Random(seed), (signal.SIGTERM, signal.SIGKILL)[seed % 2]
    process = start(commands[name], tmp_path / "out")
    try:
        assert wait(lambda: process.poll() is not None or len(processes_of(process.pid)) > 2, 120)
        wait(lambda: process.poll() is not None or list(tmp_path.rglob("*.partial")) != [], rng.choice((0.5, 60)))
        time.sleep(rng.random())
        process.send_signal(number)
        process.communicate(timeout=60)
        assert wait(lambda: not processes_of(process.pid), 30), f"{len(processes_of(process.pid))} workers go on without their parent"
    finally:
        for pid in processes_of(process.pid):
            os.kill(pid, signal.SIGKILL)
    again = start(commands[name], tmp_path / "out")
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0 and "Traceback" not in output, output
    assert contents(tmp_path / "out") == whole[name]
