"""A checkpoint that is no longer what was written is never trained on, nor exported: it is named, with the way out."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import load_config
from eqldm.run_model import export_checkpoint
from eqldm.training.checkpoints import LAST, read_checkpoint, step_checkpoint

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stopped(make_picture_shards, write_tiny_options, tmp_path_factory) -> Path:
    """A folder with options and a run of four steps, which keeps those of 2 and 4, the newest under two names."""
    folder = tmp_path_factory.mktemp("stopped")
    shards = make_picture_shards(folder / "shards", count=8, size=16)
    options = write_tiny_options(folder / "tiny.yaml", shards, num_steps=4, checkpoint_every=2, keep_every=2)
    train_autoencoder(load_config(options))
    return folder


def copied(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped / "run", tmp_path / "run", ignore=shutil.ignore_patterns("last.ckpt"))
    (tmp_path / "run" / LAST).hardlink_to(tmp_path / "run" / step_checkpoint(4))
    return tmp_path / "run"


def flip(path: Path, seed: int, bits: int = 1) -> None:
    """Flips bits of the file in place, so under all of its names, in what torch.load reads: not in the padding between tensors."""
    draw, data = random.Random(seed), bytearray(path.read_bytes())
    weights = [value for value in read_checkpoint(path)["state_dict"].values() if value.numel() > 50]
    start = data.index(weights[seed % len(weights)].numpy().tobytes())
    for _ in range(bits):
        data[start + draw.randrange(200)] ^= 1 << draw.randrange(8)
    with open(path, "rb+") as file:
        file.write(data)


@pytest.mark.fault("one bit flipped in a weight of a checkpoint of two names", tries=4)
def test_a_flipped_bit(stopped, tmp_path, seed):
    run = copied(stopped, tmp_path)
    flip(run / LAST, seed)
    more = load_config(stopped / "tiny.yaml", [f"run.dir={run}", "run.num_steps=5"])
    with pytest.raises(
        ValueError, match=r"last.ckpt' cannot be used: it is cut or damaged, its record 'data/\d+' is not .*CRC-32"
    ) as caught:
        train_autoencoder(more)
    words = "Move it and step-000000004.ckpt (the same file) away, and the same command goes on from the one kept at step 2"
    assert str(caught.value).endswith(words)
    for step in (4, None):
        with pytest.raises(ValueError, match="cut or damaged"):
            export_checkpoint(run, step, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    for name in (LAST, step_checkpoint(4)):
        (run / name).rename(tmp_path / name.name)
    train_autoencoder(more)
    assert read_checkpoint(run / LAST)["global_step"] == 5


@pytest.mark.fault("the newest of the kept checkpoints damaged, last.ckpt gone", tries=1)
def test_the_newest_that_is_left(stopped, tmp_path, seed):
    run = copied(stopped, tmp_path)
    (run / LAST).unlink()
    flip(run / step_checkpoint(4), seed)
    with pytest.raises(ValueError, match="step-000000004.ckpt' cannot .* Move it away, and the same command goes on from .* step 2"):
        train_autoencoder(load_config(stopped / "tiny.yaml", [f"run.dir={run}", "run.num_steps=5"]))


@pytest.mark.fault("NaN or infinity in a checkpoint's weights, average or optimizer", tries=6)
def test_numbers_that_are_none(stopped, tmp_path, seed):
    run, bad = copied(stopped, tmp_path), float(["nan", "inf"][seed % 2])
    checkpoint, part = read_checkpoint(run / LAST), ["state_dict", "current_model_state", "optimizer_states"][seed % 3]
    tree = checkpoint[part][0]["state"][0]["exp_avg"] if part == "optimizer_states" else next(iter(checkpoint[part].values()))
    tree.view(-1)[0] = bad
    (run / LAST).unlink()
    torch.save(checkpoint, run / LAST)
    with pytest.raises(ValueError, match=rf"last.ckpt' cannot be used: {part}\S* holds numbers that are NaN or infinite. Move it away"):
        train_autoencoder(load_config(stopped / "tiny.yaml", [f"run.dir={run}", "run.num_steps=5"]))
    (run / step_checkpoint(4)).unlink()
    exported = {"state_dict": "ema", "current_model_state": "raw"}
    if part in exported:
        with pytest.raises(ValueError, match="holds numbers that are NaN or infinite"):
            export_checkpoint(run, 4, tmp_path / "model", exported[part])
    assert not (tmp_path / "model").exists()


@pytest.mark.fault("a state_dict that contains itself, or holds no weights", tries=3)
def test_a_state_dict_that_is_none(stopped, tmp_path, seed):
    run = copied(stopped, tmp_path)
    checkpoint = read_checkpoint(run / LAST)
    if seed == 0:
        checkpoint["state_dict"]["state_dict"] = checkpoint["state_dict"]
    elif seed == 1:
        checkpoint["callbacks"]["more"] = [checkpoint]
    else:
        checkpoint["state_dict"] = [1]
    (run / LAST).unlink()
    torch.save(checkpoint, run / LAST)
    with pytest.raises(ValueError, match="last.ckpt' is not one of a run: .*(wanted|itself).*Move it"):
        train_autoencoder(load_config(stopped / "tiny.yaml", [f"run.dir={run}", "run.num_steps=5"]))
    with pytest.raises(ValueError, match="is not one of a run"):
        export_checkpoint(run, None, tmp_path / "model")


@pytest.mark.fault("one bit flipped in a shard of ZeRO's, which one process of two reads", tries=2)
def test_a_flipped_bit_in_a_shard(tmp_path, seed, tiny_pictures, tiny_model_folder, write_tiny_unet_options):
    options = write_tiny_unet_options(
        tmp_path / "options.yaml", tiny_pictures, tiny_model_folder, num_steps=2, keep_every=1, checkpoint_every=1
    )

    def train(steps: int) -> subprocess.CompletedProcess:
        words = ["train.py", options, f"run.num_steps={steps}", "run.devices=2", "run.strategy=zero2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True)

    done = train(2)
    assert done.returncode == 0, done.stderr[-3000:]
    shard = tmp_path / "run" / LAST / "checkpoint" / f"zero_pp_rank_{seed % 2}_mp_rank_00_optim_states.pt"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 8
    with open(shard, "rb+") as file:  # and so in that of step 2, which is linked to it
        file.write(data)
    done = train(3)
    said = done.stderr + done.stdout
    assert done.returncode == 1 and f"checkpoint/{shard.name} is cut or damaged, its record 'data/" in said, said[-3000:]
    assert "Move it and step-000000002.ckpt (the same file) away, and the same command goes on from the one kept at step 1" in said
    with pytest.raises(ValueError, match=f"{shard.name} is cut or damaged"):
        export_checkpoint(tmp_path / "run", 2, tmp_path / "model")
    for name in (LAST, step_checkpoint(2)):
        shutil.rmtree(tmp_path / "run" / name)
    done = train(3)
    assert done.returncode == 0, done.stderr[-3000:]
