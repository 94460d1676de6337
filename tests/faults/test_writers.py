"""Two processes that write one output at once: one is refused or both agree, and what stays is whole."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from forks import entry, fork, status

import encode_latents
from eqldm import export
from eqldm.data.making import make_folder
from eqldm.data.samples import LatentSamples
from eqldm.data.shards import file_sha256, read_manifest, write_shard
from eqldm.model_folder import Networks, load_vae, vae_hash
from eqldm.training.callbacks import AtomicCheckpointIO

KIND = "two processes write one "


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.slow
@pytest.mark.fault(KIND + "model folder", tries=6)
def test_two_exports(tiny_model_folder, make_model_folder, tmp_path, seed, capfd):
    models = [tiny_model_folder, make_model_folder(tmp_path / "other", seed=1)]
    hashes = {vae_hash(load_vae(model).half().float()) for model in models}
    torch.manual_seed(seed)
    processes = []
    for model in models:
        processes.append(fork(entry(export.main, model, "--out", tmp_path / "out")))
        time.sleep(float(torch.rand(())) * 0.3)
    ended = [status(process) for process in processes]
    assert 0 in ended
    if 1 in ended:
        assert "out' is being written by process" in capfd.readouterr().err
    Networks.open(tmp_path / "out")
    assert vae_hash(load_vae(tmp_path / "out")) in hashes
    assert not litter(tmp_path)


@pytest.mark.slow
@pytest.mark.fault(KIND + "folder of latents", tries=6)
@pytest.mark.parametrize("launch", ["two", "one"])
def test_two_encoders(tiny_model_folder, tiny_pictures, tmp_path, seed, launch, capfd):
    out = tmp_path / "out"
    words = ["--data", tiny_pictures, "--model", tiny_model_folder, "--out", out, "--num-workers", 0, "--batch-size", 3]
    if launch == "one":  # of two processes, which share the work
        os.environ.update(WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(seed))
    try:
        first = fork(entry(encode_latents.main, *words))
        time.sleep(seed * 0.1)
        if launch == "one":
            os.environ["RANK"] = "1"
        second = fork(entry(encode_latents.main, *words))
    finally:
        for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    ended = [status(first), status(second)]
    assert ended == [0, 0] if launch == "one" else 0 in ended
    if 1 in ended:
        assert "out' is being encoded by process" in capfd.readouterr().err
    assert {entry["name"]: entry["sha256"] for entry in read_manifest(out)["shards"]} == {
        path.name: file_sha256(path) for path in out.glob("*.tar")
    }
    assert len(LatentSamples(out)) == 24 and not litter(out)


@pytest.mark.slow
@pytest.mark.fault(KIND + "folder of pictures", tries=6)
def test_two_makers(tmp_path, seed, capfd):
    jobs = {f"{number}.tar": number for number in range(8)}

    def write(number: int) -> dict:
        time.sleep(0.02)
        return write_shard(tmp_path / "out" / f"{number}.tar", [{"__key__": "0", "txt": str(number)}])

    def make() -> None:
        make_folder(tmp_path / "out", jobs, write, {"generator": {"name": "numbers"}})

    first = fork(make)
    time.sleep(seed * 0.04)
    ended = [status(process) for process in (first, fork(make))]
    assert 0 in ended
    if 1 in ended:
        assert "out' is being made by process" in capfd.readouterr().err
    found = {entry["name"]: entry["sha256"] for entry in read_manifest(tmp_path / "out")["shards"]}
    assert found == {path.name: file_sha256(path) for path in (tmp_path / "out").glob("*.tar")} and len(found) == 8
    assert not litter(tmp_path / "out")


@pytest.mark.fault(KIND + "checkpoint", tries=4)
def test_two_checkpoint_writers(tmp_path, seed):
    """A run's folder is locked, but its lock may be none on a file system without: what is read is whole all the same."""
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    processes = []
    for number in range(3):
        content = {"number": number, "weights": torch.full((200_000,), float(number))}
        processes.append(fork(lambda content=content: [io.save_checkpoint(content, path) for _ in range(5)]))
    while processes := [process for process in processes if os.waitpid(process, os.WNOHANG) == (0, 0)]:
        if path.exists():
            found = io.load_checkpoint(path)
            assert bool((found["weights"] == found["number"]).all())
    assert not litter(tmp_path)
