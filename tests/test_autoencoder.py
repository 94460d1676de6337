"""Stage 1 from options to exported model: it trains, resumes bit for bit, and does not depend on how it is split."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image

from eqldm.autoencoder.fold import latent_matrix
from eqldm.autoencoder.module import Autoencoder, train_autoencoder
from eqldm.config import AutoencoderConfig, load_config
from eqldm.data.samples import PictureSamples
from eqldm.data.shards import write_manifest, write_shard
from eqldm.model_folder import load_vae
from eqldm.training.callbacks import AtomicCheckpointIO
from eqldm.training.run_folder import LAST

ROOT = Path(__file__).parents[1]
TINY = {
    "stage": "autoencoder",
    "architecture": {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [8, 16, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
    "data": {"batch_size": 4, "num_workers": 0, "val_samples": 4},
    "run": {"precision": "32-true", "accelerator": "cpu", "log_every": 1, "val_every": 4, "num_steps": 2, "seed": 3},
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 1, "ema_decay": 0.5},
    "loss": {"gradient_weight": 0.5, "discriminator_channels": 8, "discriminator_layers": 1},
    "fold": {"num_images": 8},
}
GAN = ["loss.adversarial_weight=0.5", "loss.adversarial_start=2"]
EQUIVARIANCE = ["equivariance.group=d4", "equivariance.consistency_weight=0.5", "equivariance.rescale_prob=0.5",
                "equivariance.permute_prob=0.3", "equivariance.negate_prob=0.3"]  # fmt: skip
MICRO = ["data.micro_batch_size=2"]


@pytest.fixture(scope="module")
def shards(make_picture_shards, tmp_path_factory) -> Path:
    return make_picture_shards(tmp_path_factory.mktemp("shards"), count=20, size=32)


@pytest.fixture
def configured(shards, tmp_path):
    """`configured("a", "key=value", ...)`: the tiny options with overrides, for the run folder `tmp_path / "a"`."""
    path = tmp_path / "tiny.yaml"

    def build(name: str, *overrides: str) -> AutoencoderConfig:
        dropped = {"architecture"} if "init=pretrained" in overrides else set()
        path.write_text(yaml.safe_dump({key: value for key, value in TINY.items() if key not in dropped}))
        return load_config(path, [f"data.train={shards}", f"data.val={shards}", f"run.dir={tmp_path / name}", *overrides])

    return build


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory) -> Path:
    """The run folder of two steps from scratch."""
    folder = tmp_path_factory.mktemp("plain")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    train_autoencoder(load_config(path, [f"data.train={shards}", f"data.val={shards}", f"run.dir={folder / 'run'}"]))
    return folder / "run"


def checkpoint(config: AutoencoderConfig) -> dict:
    return torch.load(Path(config.run.dir) / LAST, weights_only=True)


def rows(config: AutoencoderConfig, name: str) -> dict[int, float]:
    """What the CSV log says of a metric, by step."""
    with open(Path(config.run.dir) / "logs" / "metrics.csv") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def assert_same(a, b, where: str = "") -> None:
    """Two trees of tensors and plain values are equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            assert_same(a[name], b[name], f"{where}/{name}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def assert_same_runs(a: AutoencoderConfig, b: AutoencoderConfig) -> None:
    """Both runs ended with the same weights, averages, optimizer states and exported models, bit for bit."""
    first, second = checkpoint(a), checkpoint(b)
    assert first["global_step"] == second["global_step"] == a.run.num_steps
    for part in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        if part in first or part in second:
            assert_same(first[part], second[part], part)
    exported = [load_vae(Path(config.run.dir) / "model").state_dict() for config in (a, b)]
    assert_same(*exported, "model")


def weights(state: dict) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in sorted(state.items()) if name.startswith("vae.")])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_two_steps_from_scratch(plain, shards):
    torch.manual_seed(3)
    start = AutoencoderKL(sample_size=32, **TINY["architecture"]).state_dict()
    trained = torch.load(plain / LAST, weights_only=True)["current_model_state"]
    moved = [not torch.equal(start[name], trained[f"vae.{name}"]) for name in start]
    assert all(moved) and all(w.isfinite().all() for w in trained.values())
    for name in ("config.yaml", "command.txt", "versions.json", "done.json", "logs/metrics.csv"):
        assert (plain / name).is_file(), name
    assert any((plain / "logs").glob("events.out.tfevents.*"))

    vae = AutoencoderKL.from_pretrained(plain / "model", subfolder="vae")
    assert vae.config.scaling_factor == 1 and vae.config.sample_size == 32
    latents = latent_matrix(vae.eval(), PictureSamples(shards, seed=3), 8)  # the pictures that were measured
    assert torch.allclose(latents.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(latents.std(0, unbiased=False), torch.ones(4, dtype=torch.float64), atol=1e-4)


def test_fine_tuning_with_everything_on(plain, configured):
    config = configured("tuned", "init=pretrained", f"model={plain / 'model'}", *EQUIVARIANCE, *GAN,
                        "loss.adversarial_start=0", "equivariance.anisotropic=true", "run.val_every=2",
                        "run.precision=bf16-mixed")  # fmt: skip
    vae = load_vae(train_autoencoder(config))
    assert all(w.isfinite().all() for w in vae.state_dict().values())
    for name in ("loss", "l1", "l2", "gradient", "kl", "consistency", "adversarial", "adaptive_weight", "discriminator", "logits_real",
                 "logits_fake", "discriminator_accuracy", "grad_norm_vae", "grad_norm_discriminator", "latent_std"):  # fmt: skip
        assert list(rows(config, f"train/{name}")) == [0, 1], name
    assert rows(config, "train/consistency")[0] == 0 < rows(config, "train/consistency")[1]  # the variance is measured first
    assert rows(config, "val/reconstruction/psnr") and rows(config, "val/equivariance/rotate_90/latent_error")


def test_eqvae_paper_with_gan(configured):
    config = configured("paper", "equivariance.preset=eqvae_paper", *GAN, "loss.adversarial_start=0", "run.num_steps=4")
    assert load_vae(train_autoencoder(config))
    losses, accuracy = (rows(config, f"train/{name}").values() for name in ("discriminator", "discriminator_accuracy"))
    assert all(value > 0 for value in losses) and all(0 <= value <= 1 for value in accuracy)


def test_gan_from_a_later_step_counts_optimizer_steps(configured):
    options = [*GAN, *MICRO, "run.num_steps=4", "optimizer.schedule=linear", "run.checkpoint_every=3"]
    config = configured("late", *options, "loss.discriminator_learning_rate=5e-4")
    train_autoencoder(config)
    state = checkpoint(config)
    generator, discriminator = state["optimizer_states"]
    assert state["global_step"] == 4
    assert {int(s["step"]) for s in generator["state"].values()} == {4}
    assert {int(s["step"]) for s in discriminator["state"].values()} == {2}  # from step 2 on
    assert [schedule["last_epoch"] for schedule in state["lr_schedulers"]] == [4, 4]
    assert list(rows(config, "train/loss")) == [0, 1, 2, 3]  # the log counts optimizer steps too, not micro-batches
    assert list(rows(config, "train/discriminator")) == [2, 3]
    rates = rows(config, "lr-AdamW")
    assert [rates[step] for step in range(4)] == pytest.approx([1e-3, 2e-3, 2e-3 * (0.01 + 0.99 * 2 / 3), 2e-3 * (0.01 + 0.99 / 3)])
    assert rows(config, "lr-AdamW-1") == pytest.approx({step: rate / 4 for step, rate in rates.items()})


def test_the_discriminators_figures_are_of_real_and_of_fake_pictures(configured):
    """Means over all patches of groups of unlike size, by hand."""
    module = Autoencoder(configured("figures", *GAN, "loss.adversarial_start=0"), AutoencoderKL(sample_size=32, **TINY["architecture"]))
    torch.manual_seed(1)
    pairs = [(torch.rand(count, 3, 32, 32), torch.rand(count, 3, 32, 32) * 2 - 1) for count in (1, 3)]
    fake, real = (module.discriminator(torch.cat(pictures)).detach() for pictures in zip(*pairs))
    terms = module._discriminator_terms(pairs)
    assert float(terms["logits_real"]) == pytest.approx(float(real.mean()), abs=1e-6)
    assert float(terms["logits_fake"]) == pytest.approx(float(fake.mean()), abs=1e-6)
    right = torch.cat([real > 0, fake < 0]).float().mean()
    assert float(terms["discriminator_accuracy"]) == pytest.approx(float(right), abs=1e-6)
    assert float(terms["discriminator"].detach()) == pytest.approx(float((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2, rel=1e-5)


@pytest.mark.parametrize("options", [
    pytest.param(["optimizer.ema_decay=0"], id="no-ema"),
    pytest.param([*MICRO, *EQUIVARIANCE, *GAN], id="accumulation-equivariance-gan"),
])  # fmt: skip
def test_resumed_equals_uninterrupted(configured, options):
    """Stopped at its last step, and then given more steps by the same command."""
    whole, parts = configured("whole", *options, "run.num_steps=5"), configured("parts", *options, "run.num_steps=3")
    train_autoencoder(whole)
    train_autoencoder(parts)
    parts.run.num_steps = 5
    train_autoencoder(parts)
    assert_same_runs(whole, parts)


def test_killed_between_checkpoints_equals_uninterrupted(configured, monkeypatch):
    """Stopped within step 4, of whose first micro-batch nothing may stay; the last checkpoint is that of step 4."""
    options = [*MICRO, *GAN, "run.num_steps=5", "run.checkpoint_every=2", "run.val_every=3", "data.num_workers=1"]
    whole, killed = configured("whole", *options), configured("killed", *options)
    train_autoencoder(whole)
    completes_step = Autoencoder._completes_step

    def break_at_step_3(self, batch):
        if self.step == 3 and completes_step(self, batch):
            raise RuntimeError("power failure")
        return completes_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Autoencoder, "_completes_step", break_at_step_3)
        with pytest.raises(RuntimeError, match="power failure"):
            train_autoencoder(killed)
    assert checkpoint(killed)["global_step"] == 2 and not (Path(killed.run.dir) / "model").exists()
    train_autoencoder(killed)
    assert_same_runs(whole, killed)


def test_a_run_killed_before_its_export_exports_the_averaged_weights(configured, monkeypatch):
    whole, killed = configured("whole"), configured("killed")
    train_autoencoder(whole)
    with monkeypatch.context() as patch:
        patch.setattr("eqldm.autoencoder.module.fold_channels", lambda *args: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            train_autoencoder(killed)
    train_autoencoder(killed)
    assert_same_runs(whole, killed)


def test_resuming_with_other_micro_batches(configured):
    """The same pictures and draws whatever the split: equal up to the order of float32 sums."""
    whole, parts = configured("whole", "run.num_steps=4"), configured("parts", "run.num_steps=3")
    train_autoencoder(whole)
    train_autoencoder(parts)
    parts.run.num_steps, parts.data.micro_batch_size = 4, 2
    train_autoencoder(parts)
    assert relative(*(weights(checkpoint(c)["current_model_state"]) for c in (parts, whole))) < 1e-4
    assert list(rows(parts, "train/loss")) == [0, 1, 2, 3]
    assert list(rows(parts, "val/reconstruction/psnr")) == list(rows(whole, "val/reconstruction/psnr"))


def assert_same_gradients(a: AutoencoderConfig, b: AutoencoderConfig, tolerance: float) -> None:
    """The steps of both runs agree to float tolerance.

    AdamW divides a gradient by its size: where a gradient is nothing but rounding, the two runs may step in opposite
    directions by a whole learning rate, so single weights are no measure. What can be held is (1) its first moment, which
    sums the clipped gradients of all steps, as a whole; (2) the logged gradient norm of each step, taken over the global
    batch; (3) all weights together, relative to the way that they went.
    """
    first, second = checkpoint(a), checkpoint(b)
    moments = [torch.cat([s["exp_avg"].flatten() for s in state["optimizer_states"][0]["state"].values()]) for state in (first, second)]
    assert relative(*moments) < tolerance
    for step, norm in rows(a, "train/grad_norm_vae").items():
        assert rows(b, "train/grad_norm_vae")[step] == pytest.approx(norm, rel=tolerance)
    assert rows(a, "train/latent_std") == pytest.approx(rows(b, "train/latent_std"), rel=tolerance)
    torch.manual_seed(a.run.seed)
    vae = AutoencoderKL(sample_size=32, **TINY["architecture"])
    start = weights({f"vae.{name}": w for name, w in vae.state_dict().items()})
    ways = [weights(state["current_model_state"]) - start for state in (first, second)]
    assert relative(*ways) < 10 * tolerance  # measured: 1e-4 in micro-batches, 1e-6 in two processes


def test_micro_batches_take_the_step_of_the_whole_batch(configured):
    options = [*EQUIVARIANCE, "equivariance.anisotropic=true", "run.num_steps=3"]
    whole, parts = configured("whole", *options), configured("parts", *options, "data.micro_batch_size=1")
    train_autoencoder(whole)
    train_autoencoder(parts)
    assert_same_gradients(whole, parts, 1e-4)  # measured: 6e-6


def test_two_processes_equal_one(configured, tmp_path):
    options = [*EQUIVARIANCE, "run.num_steps=3", "data.micro_batch_size=1"]
    one, two = configured("one", *options), configured("two", *options, "run.devices=2", "run.strategy=ddp")
    train_autoencoder(one)
    overrides = [f"data.train={two.data.train}", f"data.val={two.data.val}", f"run.dir={two.run.dir}"]
    command = [sys.executable, ROOT / "train.py", tmp_path / "tiny.yaml", *overrides, *options, "run.devices=2", "run.strategy=ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_gradients(one, two, 1e-4)  # measured: 6e-7


@pytest.mark.parametrize("micro", [[], MICRO], ids=["whole", "micro"])
def test_nan_guard_stops_before_the_weights_are_lost(configured, micro):
    config = configured("lost", "optimizer.warmup_steps=0", "run.checkpoint_every=1", *micro)
    config.optimizer.learning_rate = 1e10  # which no file may state
    wanted = r"not finite at step 1: l1 = .*kl = .*loss = .*Batch: 0000.*another run.dir"
    with pytest.raises(FloatingPointError, match=wanted) as caught:
        train_autoencoder(config)
    assert str(caught.value).count("00000") == 4 // (2 if micro else 1)  # the keys of the batch at hand
    assert not (Path(config.run.dir) / "model").exists()


def test_nan_guard_sees_gradients_too(configured, monkeypatch):
    """A finite loss with an infinite gradient must not reach the weights, whose checkpoint would then be lost too."""
    clip = torch.nn.utils.clip_grad_norm_

    def overflow(parameters, limit):
        parameters = list(parameters)
        parameters[0].grad.view(-1)[0] = float("inf")
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    config = configured("overflow", "run.checkpoint_every=1")
    with pytest.raises(FloatingPointError, match=r"step 0: .*grad_norm_vae = inf"):
        train_autoencoder(config)
    assert not (Path(config.run.dir) / LAST).exists()


def test_full_disk_stops_with_the_checkpoint_before(configured, monkeypatch):
    config = configured("full", "run.num_steps=4", "run.checkpoint_every=2")
    save = torch.save

    def full(checkpoint, file):
        if checkpoint["global_step"] == 4:
            raise OSError(28, "No space left on device")
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left.*The one before it is kept"):
            train_autoencoder(config)
    assert AtomicCheckpointIO().load_checkpoint(Path(config.run.dir) / LAST)["global_step"] == 2
    train_autoencoder(config)
    assert checkpoint(config)["global_step"] == 4


def test_what_cannot_work_is_an_error(configured, make_picture_shards, tmp_path):
    odd = make_picture_shards(tmp_path / "odd", count=4, size=30)
    with pytest.raises(ValueError, match="pictures of 30 px do not divide by the VAE's f = 4"):
        train_autoencoder(configured("odd-run", f"data.train={odd}", f"data.val={odd}"))
    wide = tmp_path / "wide"
    wide.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (64, 32)).save(picture, "png")
    entry = write_shard(wide / "wide.tar", [{"__key__": str(i), "png": picture.getvalue()} for i in range(4)])
    write_manifest(wide, [entry])
    with pytest.raises(ValueError, match="wide' are 32 x 64 px, wanted squares"):
        train_autoencoder(configured("odd-run", f"data.val={wide}"))
    with pytest.raises(FileNotFoundError, match="model folder '/nowhere' does not exist"):
        train_autoencoder(configured("lost", "init=pretrained", "model=/nowhere"))
    assert not any((tmp_path / name).exists() for name in ("odd-run", "lost"))  # and leaves no run folder behind


def test_crops_are_squares_of_the_pictures_until_a_step(configured, monkeypatch):
    """Anywhere in the picture, drawn from the position: the same whatever the micro-batch, and whole from crop_until on."""
    config = configured("crops", "crop_size=8", "crop_until=2")
    module = Autoencoder(config, AutoencoderKL(**config.architecture))
    x = torch.arange(32 * 32.0).view(1, 1, 32, 32).expand(4, 3, -1, -1)
    monkeypatch.setattr(Autoencoder, "step", 0)
    crops = module._crop(x, [4, 5, 6, 7])
    assert crops.shape == (4, 3, 8, 8)
    assert all(torch.equal(crop[0] - crop[0, 0, 0], x[0, 0, :8, :8]) for crop in crops)
    assert len({float(crop[0, 0, 0]) for crop in crops}) > 1
    assert torch.equal(module._crop(x[2:], [6, 7]), crops[2:])
    monkeypatch.setattr(Autoencoder, "step", 2)
    assert module._crop(x, [8, 9, 10, 11]) is x


def test_training_on_crops_resumes_and_equals_uninterrupted(configured):
    crops = ["crop_size=16", "crop_until=2", *EQUIVARIANCE]
    whole = configured("whole", "run.num_steps=4", *crops)
    train_autoencoder(whole)
    train_autoencoder(configured("parts", "run.num_steps=1", *crops))
    parts = configured("parts", "run.num_steps=4", *crops)
    train_autoencoder(parts)
    assert_same_runs(whole, parts)


@pytest.mark.parametrize("size", [6, 64])
def test_crops_that_do_not_fit_are_refused(configured, size):
    with pytest.raises(ValueError, match=f"crop_size: got {size} px, wanted a multiple of f = 4 up to the pictures' 32 px"):
        train_autoencoder(configured("unfit", f"crop_size={size}"))
