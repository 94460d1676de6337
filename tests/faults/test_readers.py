"""Reader processes that are killed, or meet a damaged sample: one line, and the same command goes on."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from eqldm.data.shards import ShardSet, file_sha256, write_manifest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def encode(folder: Path) -> subprocess.Popen:
    words = ["--data", folder / "shards", "--model", folder / "model", "--out", folder / "latents", "--batch-size", 2, "--num-workers", 2]
    command = [sys.executable, str(ROOT / "data" / "encode_latents.py"), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists processes by /proc")
@pytest.mark.fault("a reader process killed, as where memory runs out", tries=3)
def test_a_killed_reader(make_picture_shards, make_model_folder, tmp_path, seed):
    make_picture_shards(tmp_path / "shards", count=800, size=32, shard_size=80)
    make_model_folder(tmp_path / "model")
    process = encode(tmp_path)
    while len(children(process.pid)) < 2 and process.poll() is None:
        time.sleep(0.02)
    time.sleep(random.Random(seed).random())
    readers = children(process.pid)
    assert readers, process.communicate()[0]
    os.kill(readers[seed % len(readers)], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "Traceback" not in output, output
    assert re.match(r"error: a process that reads the data (was killed \(Killed\)|ended), ", output.strip().splitlines()[-1]), output
    assert "--num-workers" in output
    again = encode(tmp_path)
    assert again.communicate(timeout=300) and again.returncode == 0
    assert json.loads((tmp_path / "latents" / "manifest.json").read_text())["count"] == 800


@pytest.mark.fault("a caption, a label or a tar damaged under the readers", tries=3)
def test_a_damaged_sample(make_picture_shards, make_model_folder, tmp_path, seed):
    shards = make_picture_shards(tmp_path / "shards", count=48, size=32, shard_size=8)
    make_model_folder(tmp_path / "model")
    found, number = ShardSet.open(shards), random.Random(seed).randrange(1, 48)
    tar = shards / found.manifest["shards"][found.shard_of(number)]["name"]
    ending = ("txt", "json", "png")[seed % 3]
    if ending == "png":  # its place in the index
        with open(shards / "index" / "places" / "png.npy", "r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write((1 << 40).to_bytes(8, "little"))
    else:
        offset, size = found.places[ending][number]
        with open(tar, "r+b") as file:
            file.seek(offset)
            file.write(b"\xff" * int(size))
        entries = found.manifest["shards"]  # else it is found when the set is opened
        entries[found.shard_of(number)]["sha256"] = file_sha256(tar)
        write_manifest(shards, entries, kind="pictures", image_size=32)
    with tarfile.open(tar) as whole:
        assert whole.getnames()
    process = encode(tmp_path)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "Traceback" not in output, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: ") and (f"'{found.keys[number]}'" in last or ending == "png"), output
