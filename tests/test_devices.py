"""What a GPU computes is what the CPU computes: training steps, bfloat16, resuming, sampling, and sampling with less memory.

On a machine without a GPU the same tests run on the CPU against itself, where something else of the computation changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import sample as sample_script
from eqldm.anagram.sampling import Sampler
from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import StageConfig, load_config
from eqldm.diffusion.module import train_diffusion
from eqldm.evaluation.judge_training import train_judge
from eqldm.model_folder import PRETRAINED
from eqldm.views import parse_view
from runs import logged

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ACCELERATOR = {"cpu": "run.accelerator=cpu", "cuda": "run.accelerator=gpu"}
EQUIVARIANCE = {"group": "d4", "consistency_weight": 0.5, "permute_prob": 0.3, "negate_prob": 0.3}
ADVERSARIAL = {"gradient_weight": 0.5, "adversarial_weight": 0.5, "discriminator_channels": 8, "discriminator_layers": 1}
JUDGE = {
    "stage": "judge", "architecture_args": {"channels": [4, 4, 8, 8]}, "optimizer": {"learning_rate": 1e-2, "ema_decay": 0.5},
}  # fmt: skip
TRAIN: dict[str, Callable[[StageConfig], Path]] = {"autoencoder": train_autoencoder, "diffusion": train_diffusion, "judge": train_judge}


@pytest.fixture(autouse=True)
def exact():
    """Convolutions of a GPU in float32, and not in its tf32, in which they are rounded to 10 bits."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture
def run(tmp_path, tiny_pictures, tiny_model_folder, write_tiny_options, write_tiny_unet_options):
    """`run(stage, name, "key=value", ..., callbacks=())`: (the run folder, its exported weights) of a tiny training of a stage."""

    def build(stage: str) -> Path:
        path = tmp_path / f"{stage}.yaml"
        if stage in ("unet", "lora"):
            write_tiny_unet_options(path, tiny_pictures, tiny_model_folder, num_steps=3)
        else:
            write_tiny_options(path, tiny_pictures, num_steps=3)
        options = yaml.safe_load(path.read_text())
        if stage == "lora":
            options |= {"adapt": "lora", "lora": {"rank": 2}}
        elif stage == "autoencoder":
            options |= {"equivariance": EQUIVARIANCE, "loss": ADVERSARIAL}
        elif stage == "judge":
            options = {**JUDGE, "data": options["data"], "run": options["run"]}
        path.write_text(yaml.safe_dump(options))
        return path

    def call(stage: str, name: str, *overrides: str, callbacks: Sequence[pl.Callback] = ()) -> tuple[Path, dict[str, Tensor]]:
        config = load_config(build(stage), [f"run.dir={tmp_path / name}", *overrides])
        train = TRAIN[config.stage]
        model = train(config, callbacks) if callbacks else train(config)
        part = {"autoencoder": model / "vae", "judge": model}.get(stage, model / "unet")
        return tmp_path / name, load_file(next(part.glob("*.safetensors")))

    return call


def check_alike(
    runs: Sequence[tuple[Path, dict[str, Tensor]]], start: dict[str, Tensor], record: Callable, losses: float = 1e-3, weights: float = 5e-3
) -> None:
    """Asserts that two runs logged the same losses, to a share of them, and ended at the same weights, to a share of their way there. Both
    shares are recorded.

    AdamW's first steps divide each gradient by its own size, so that rounding in gradients near 0 moves single weights by as much as the
    learning rate: the updates are compared as a whole.
    """
    (one, a), (other, b) = runs
    x, y = (torch.tensor(logged(folder, "train/loss")) for folder in (one, other))
    difference = float(((y - x) / x).abs().max())
    moved = torch.cat([(a[name] - start[name]).flatten().float() for name in a]).norm()
    apart = torch.cat([(a[name] - b[name]).flatten().float() for name in a]).norm()
    record("losses differ by at most", difference)
    record("weights differ by, of their way", float(apart / moved))
    assert len(x) == len(y) == 3 and moved > 1e-4 and difference <= losses and apart / moved <= weights


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stage", ["autoencoder", "unet", "lora", "judge"])
def test_training_steps_are_those_of_the_cpu(run, stage, device, record_property):
    other = ["run.channels_last=true"] if (device, stage != "judge") == ("cpu", True) else []
    start = run(stage, "start", "run.num_steps=1", "optimizer.learning_rate=1e-12", "optimizer.ema_decay=0")[1]
    check_alike([run(stage, "one"), run(stage, "other", ACCELERATOR[device], *other)], start, record_property)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stage", ["autoencoder", "unet"])
def test_losses_in_bfloat16_are_near(run, stage, device, record_property):
    """Over 20 steps, in which the loss falls."""
    both = [run(stage, p, ACCELERATOR[device], "run.num_steps=20", f"run.precision={p}")[0] for p in ("32-true", "bf16-mixed")]
    whole, half = (torch.tensor(logged(folder, "train/loss")) for folder in both)
    difference = float(((half - whole).abs() / whole).mean())
    record_property("losses differ by, in the mean", difference)
    assert len(whole) == 20 and 0 < difference < 0.02


class StopAt(pl.Callback):
    """Stands for a killed process."""

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == 2:
            raise KeyError("killed")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stage", ["autoencoder", "unet"])
def test_a_resumed_run_is_an_uninterrupted_one(run, stage, device, record_property):
    """On a CPU bit for bit; a GPU adds in no fixed order."""
    chosen = [ACCELERATOR[device], "run.checkpoint_every=1"]
    whole = run(stage, "whole", *chosen)
    with pytest.raises(KeyError, match="killed"):
        run(stage, "resumed", *chosen, callbacks=[StopAt()])
    resumed = run(stage, "resumed", *chosen)
    start = run(stage, "start", "run.num_steps=1", "optimizer.learning_rate=1e-12", "optimizer.ema_decay=0")[1]
    exactly = {"losses": 0.0, "weights": 0.0} if device == "cpu" else {}
    check_alike([whole, resumed], start, record_property, **exactly)


def levels(a: Tensor, b: Tensor) -> float:
    """How many of the 255 levels of a picture file two pictures in [-1, 1] differ by at most."""
    return float((a - b).abs().max()) * 127.5


@pytest.mark.parametrize("device", DEVICES)
def test_ten_seeds_are_the_cpus_pictures(device, record_property):
    """Of the shipped model; on the CPU all at once, against two batches."""
    steps = 20 if device == "cuda" else 3
    prompts, views = ["the letter A", "the letter V"], [parse_view("identity"), parse_view("rotate_180")]
    wanted = Sampler.open(PRETRAINED / "glyphs-eq", "cpu")(prompts, views, range(10), num_inference_steps=steps)
    sampler = Sampler.open(PRETRAINED / "glyphs-eq", device)
    halves = [sampler(prompts, views, seeds, num_inference_steps=steps) for seeds in (range(5), range(5, 10))]
    record_property("levels of 255", levels(torch.cat(halves), wanted))
    assert levels(torch.cat(halves), wanted) < 1 and levels(wanted[:1], wanted[1:2]) > 20


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["tf32", "bf16-mixed"])
def test_faster_arithmetic_draws_the_same_letters(how, record_property):
    """As a user samples: in tf32, torch's own choice for convolutions, and in bfloat16. How far its pictures are is recorded."""
    prompts, views, seeds = ["the letter A", "the letter V"], [parse_view("identity"), parse_view("rotate_180")], range(10)
    wanted = Sampler.open(PRETRAINED / "glyphs-eq", "cpu")(prompts, views, seeds, num_inference_steps=20)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        sampler = Sampler.open(PRETRAINED / "glyphs-eq", "cuda", "32-true" if how == "tf32" else how)
        found = sampler(prompts, views, seeds, num_inference_steps=20)
    record_property("levels of 255, mean", float((found - wanted).abs().mean()) * 127.5)
    assert (found - wanted).abs().mean() < 0.1


def drawn(out: Path, model: Path, monkeypatch, *words) -> list[np.ndarray]:
    """The picture files of two seeds, each a batch, by sample.py."""
    base = ["--model", model, "--prompts", "the letter a", "the letter v", "--num-samples", 2, "--batch-size", 1, "--out", out]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, [*base, "--num-inference-steps", 2, "--precision", "32-true", *words])])
    sample_script.main()
    return [np.asarray(Image.open(out / f"{seed}.png")).astype(int) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("switch", "device"),
    [("--attention-slicing", DEVICES[0]), ("--tiled", DEVICES[0]), *(pytest.param(switch, "cuda", marks=pytest.mark.gpu)
     for switch in ("--attention-slicing", "--tiled", "--offload"))],
)  # fmt: skip
def test_less_memory_gives_the_same_pictures(switch, device, tiny_model_folder, tmp_path, monkeypatch):
    plain, frugal = (drawn(tmp_path / str(len(s)), tiny_model_folder, monkeypatch, "--device", device, *s) for s in ([], [switch]))
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(plain, frugal))


@pytest.mark.parametrize("device", DEVICES)
def test_large_pictures_in_tiles(device, tiny_model_folder, tmp_path, monkeypatch):
    """Larger than a tile: only the seams between tiles may differ."""
    size = ["--device", device, "--image-size", 96]
    plain, tiled = (drawn(tmp_path / str(len(s)), tiny_model_folder, monkeypatch, *size, *s) for s in ([], ["--tiled"]))
    assert all(np.abs(a - b).mean() < 20 for a, b in zip(plain, tiled))


@pytest.mark.gpu
def test_an_offloaded_model_is_asked_whether_it_knows_negation(tiny_model_folder, tmp_path, monkeypatch):
    """Seen by reading: the question put its pictures where the weights lay, and the network computed elsewhere."""
    with pytest.raises(SystemExit, match="view 'negate': this autoencoder was not trained with negation"):
        drawn(tmp_path / "out", tiny_model_folder, monkeypatch, "--device", "cuda", "--offload", "--views", "identity", "negate")
