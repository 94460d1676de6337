"""A disk that is full, or becomes so: one line that asks for room, what stood there stays, and with room the same command goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from forks import entry, fork, script, status
from PIL import Image

import encode_latents
import glyphs
import make_shards
from eqldm import evaluate, export, swap
from eqldm.autoencoder import fold
from eqldm.model_folder import Networks, load_unet, load_vae
from eqldm.training.checkpoints import newest_checkpoint, read_whole

train, sampling = script("train"), script("sample")
FULL = "the disk is full while "


@pytest.fixture
def fills(small_disk, capfd, tried):
    """`fills(main, words, sizes, check)`: runs a command that writes to the disk of each of these sizes (kilobytes, the smallest first),
    and at last to a large one; what it says of a full one is checked, and by `check(disk)` what is there."""

    def call(main: Callable[[], object], words: list, sizes: list[int], check: Callable[[Path], object] = lambda disk: None) -> None:
        failures = 0
        for size in sizes:
            disk = small_disk(size)
            capfd.readouterr()
            ended = status(fork(entry(main, *words)))
            said = capfd.readouterr().err
            check(disk)
            if ended:
                failures += 1
                lines = [line for line in said.splitlines() if "rror" in line]
                assert len(lines) == 1 and lines[0].startswith("error: "), said
                assert any(words in lines[0] for words in ("make room", "free some", "no space left")), said
                assert "Traceback" not in said and not list(disk.rglob("*.partial")), said
        tried(failures)
        small_disk(200_000)
        assert status(fork(entry(main, *words))) == 0, capfd.readouterr().err
        check(small_disk(200_000))

    return call


@pytest.fixture
def disk(small_disk) -> Path:
    return small_disk(8)


@pytest.mark.slow
@pytest.mark.fault(FULL + "a model is exported", tries=3)
@pytest.mark.parametrize("command", ["folder", "file", "ckpt", "swap", "fold"])
def test_export(fills, disk, tiny_model_folder, tiny_pictures, make_tiny_vae, make_model_folder, tmp_path, seed, command):
    out = disk / "out"
    sizes = [size + 9 * seed for size in (8, 40, 90, 160, 240)]
    if command == "folder":
        fills(export.main, [tiny_model_folder, "--out", out], sizes, lambda _: out.exists() and Networks.open(out))
    elif command == "swap":
        donor = make_model_folder(tmp_path / "donor", seed=1)
        words = [tiny_model_folder, "--vae", donor, "--out", out]
        fills(swap.main, words, sizes, lambda _: out.exists() and Networks.open(out))
    elif command == "fold":
        words = [tiny_model_folder, "--data", tiny_pictures, "--num-images", 8, "--out", out]
        fills(fold.main, words, sizes[:3], lambda _: out.exists() and load_vae(out))
    else:
        from eqldm.model_folder import save_model_folder

        blocks = {"block_out_channels": (32, 32), "norm_num_groups": 32, "down_block_types": ("DownEncoderBlock2D",) * 2}
        vae = make_tiny_vae(**blocks, up_block_types=("UpDecoderBlock2D",) * 2)
        model = save_model_folder(tmp_path / "model", vae=vae)
        out = disk / ("out.safetensors" if command == "file" else "out.ckpt")
        fills(export.main, [model, "--out", out, "--single-file"], sizes[:4], lambda _: out.exists() and load_vae(out))


@pytest.mark.slow
@pytest.mark.fault(FULL + "a run trains and exports", tries=3)
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion", "lora"])
def test_training(fills, disk, make_picture_shards, write_tiny_options, write_tiny_unet_options, tiny_model_folder, tmp_path, seed, stage):
    shards = make_picture_shards(tmp_path / "shards", count=8, size=32)
    steps = {"num_steps": 3, "checkpoint_every": 1, "keep_every": 2, "val_every": 2, "dir": str(disk / "run")}
    write = write_tiny_options if stage == "autoencoder" else write_tiny_unet_options
    path = write(tmp_path / "tiny.yaml", shards, *([] if stage == "autoencoder" else [tiny_model_folder]), **steps)
    words = [path, *(["adapt=lora"] if stage == "lora" else [])]

    def check(_: Path) -> None:
        if newest := newest_checkpoint(disk / "run"):
            read_whole(newest)
        if (disk / "run" / "model").exists():
            (load_vae if stage == "autoencoder" else load_unet)(disk / "run" / "model")

    fills(train.main, words, [size + 31 * seed for size in (8, 60, 200, 500, 800, 1200)], check)


@pytest.mark.slow
@pytest.mark.fault(FULL + "data are made", tries=3)
@pytest.mark.parametrize("command", ["glyphs", "make_shards", "encode_latents"])
def test_data(fills, disk, tiny_model_folder, tiny_pictures, tmp_path, seed, command):
    out, sizes = disk / "out", [size + 7 * seed for size in (4, 24, 48, 80)]
    if command == "glyphs":
        words = ["--num-train", 12, "--num-val", 2, "--num-test", 2, "--size", 32, "--shard-size", 3, "--workers", 1 + seed % 2]
        fills(glyphs.main, ["--out", out, *words], sizes)
    elif command == "make_shards":
        for number in range(12):
            (tmp_path / "pictures").mkdir(exist_ok=True)
            Image.effect_noise((32, 32), 50 + number).convert("RGB").save(tmp_path / "pictures" / f"{number}.png")
        words = [
            "--pictures",
            tmp_path / "pictures",
            "--allow-missing-captions",
            "--size",
            32,
            "--shard-size",
            3,
            "--workers",
            1 + seed % 2,
        ]
        fills(make_shards.main, [*words, "--out", out], sizes)
    else:
        words = ["--data", tiny_pictures, "--model", tiny_model_folder, "--num-workers", 0]
        fills(encode_latents.main, [*words, "--out", out], sizes)


@pytest.mark.slow
@pytest.mark.fault(FULL + "pictures are sampled or measured", tries=3)
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_pictures(fills, disk, tiny_model_folder, tiny_pictures, seed, command):
    out, sizes = disk / "out", [size + 5 * seed for size in (4, 16, 32, 64)]
    if command == "sample":
        prompts = ["--prompts", "the letter a", "the letter v", "--num-samples", 2, "--num-inference-steps", 2, "--animate", "gif"]
        fills(sampling.main, ["--model", tiny_model_folder, *prompts, "--out", out], sizes)
    else:
        words = ["--metrics", "reconstruction", "equivariance", "--without", "lpips", "inception", "--num-images", 8, "--out", out]
        fills(evaluate.main, [tiny_model_folder, "--data", tiny_pictures, *words], sizes)
