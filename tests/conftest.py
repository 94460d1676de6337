"""Shared by all tests: tiny shard folders and a tiny autoencoder, made here, on the CPU, offline."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import settings
from PIL import Image

from eqldm.data.shards import write_manifest, write_shard
from eqldm.diffusion.conditioning import make_text_encoder, make_tokenizer
from eqldm.evaluation.judge import save_judge
from eqldm.model_folder import make_scheduler, save_model_folder
from versions import differences

torch.set_num_threads(1)
settings.register_profile("eqldm", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("eqldm")


def pytest_report_header() -> str:
    """Which versions the tests run on, beside the lock's."""
    other = [f"{name} {found} ({wanted})" for name, wanted, found in differences()]
    return f"versions: {'not those of requirements.lock: ' + ', '.join(other) if other else 'those of requirements.lock'}"


def pytest_addoption(parser):
    parser.addoption("--times", type=int, default=1, help="how many times as often each fault of tests/faults is tried")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def picture_bytes(seed: int, size: int = 32) -> bytes:
    """A PNG of 4 x 4 random coloured patches, smoothly enlarged: no symmetry, and easy to learn."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(patches).resize((size, size), Image.Resampling.BILINEAR).save(buffer, "png")
    return buffer.getvalue()


def make_picture_shards(
    folder: Path, count: int = 24, size: int = 32, shard_size: int = 8, seed: int = 0, corrupt: Collection[int] = (),
    caption: str = "picture {}",
) -> Path:  # fmt: skip
    """A shard folder of random pictures with captions (of their number) and labels; the numbers in `corrupt` hold half a PNG."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for first in range(0, count, shard_size):
        samples = []
        for number in range(first, min(first + shard_size, count)):
            png = picture_bytes(seed * 1000 + number, size)
            samples.append(
                {
                    "__key__": f"{number:09d}",
                    "png": png[: len(png) // 2] if number in corrupt else png,
                    "txt": caption.format(number),
                    "json": {"label": number % 3},
                }
            )
        entries.append(write_shard(folder / f"pictures-{first // shard_size:06d}.tar", samples))
    write_manifest(folder, entries, kind="pictures", image_size=size)
    return folder


@pytest.fixture(name="make_picture_shards", scope="session")
def _make_picture_shards() -> Callable[..., Path]:
    """The function above: `make_picture_shards(folder, count=24, size=32, shard_size=8, seed=0, corrupt=(), caption="picture {}")`."""
    return make_picture_shards


def make_tiny_vae(seed: int = 0, **changes) -> AutoencoderKL:
    """A random AutoencoderKL with f = 4 and 4 latent channels; `changes` replace its arguments."""
    torch.manual_seed(seed)
    arguments = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
        "sample_size": 32,
    }
    return AutoencoderKL(**{**arguments, **changes}).eval()


@pytest.fixture(name="make_tiny_vae", scope="session")
def _make_tiny_vae() -> Callable[..., AutoencoderKL]:
    """The function above: `make_tiny_vae(seed=0, **changes)`."""
    return make_tiny_vae


@pytest.fixture
def tiny_vae() -> AutoencoderKL:
    """A fresh tiny autoencoder, always with the same weights."""
    return make_tiny_vae()


TINY_UNET = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
TINY_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def make_model_folder(folder: Path, seed: int = 0, vae: AutoencoderKL | None = None, captions=(), max_length=8, **scheduler) -> Path:
    """A whole random model folder for 32 px (latents of 8 x 8) that knows the words of some captions and of `captions`;
    `scheduler` replaces the scheduler's arguments."""
    captions = ["the letter a", "the letter v", *(f"picture {number}" for number in range(10)), *captions]
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(captions, max_length)
    text_encoder = make_text_encoder(tokenizer, hidden_size=16, intermediate_size=32)
    unet = UNet2DConditionModel(**TINY_UNET, sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=16)
    return save_model_folder(
        Path(folder),
        vae=vae or make_tiny_vae(seed),
        unet=unet.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        scheduler=make_scheduler({**TINY_SCHEDULER, **scheduler}),
    )


@pytest.fixture(name="make_model_folder", scope="session")
def _make_model_folder() -> Callable[..., Path]:
    """The function above: `make_model_folder(folder, seed=0, vae=None, captions=(), max_length=8, **scheduler)`."""
    return make_model_folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    """A whole random model folder, to be read only."""
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_pictures(tmp_path_factory) -> Path:
    """A shard folder of 24 pictures of 32 px in 3 shards, to be read only."""
    return make_picture_shards(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def make_judge() -> Callable[[Path, int], Path]:
    """`make_judge(folder, seed)`: a tiny judge of random weights."""

    def make(folder: Path, seed: int) -> Path:
        torch.manual_seed(seed)
        about = {"architecture": "resnet18", "args": {"channels": [8, 8, 8, 8]}, "image_size": 32}
        save_judge(folder, timm.create_model("resnet18", num_classes=27, channels=[8, 8, 8, 8]), about)
        return folder

    return make


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kilobytes)`: the folder of a file system of its own, that is so large; called again with another size, it grows or
    shrinks to that."""
    folder = tmp_path / "disk"

    def mount(kilobytes: int) -> Path:
        again = "remount," if folder.exists() else ""
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"{again}size={kilobytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs leave to mount a small disk, as root has")
        return folder

    yield mount
    if folder.exists():
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


@pytest.fixture
def vgg16_weights(tmp_path, monkeypatch):
    """Random weights of VGG16 where torch's hub keeps the real ones, which LPIPS needs: 528 MB, while the test lasts."""
    from torchvision.models import VGG16_Weights, vgg16

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub-home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", pytest.fail)
    path = tmp_path / "hub-home" / "hub" / "checkpoints" / VGG16_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(vgg16(weights=None).state_dict(), path)
    yield path
    path.unlink()


def write_tiny_options(path: Path, shards: Path, **run) -> Path:
    """A config of stage 1 at `path`, whose steps take some milliseconds, for the run folder `run` beside it; `run`: options of the run."""
    options = {
        "stage": "autoencoder",
        "architecture": {"block_out_channels": [8, 8], "norm_num_groups": 4, "mid_block_add_attention": False,
                         "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
        "data": {"train": str(shards), "val": str(shards), "batch_size": 4, "num_workers": 0, "val_samples": 4},
        "run": {"precision": "32-true", "accelerator": "cpu", "dir": str(path.parent / "run"), "log_every": 1, **run},
        "optimizer": {"ema_decay": 0.5, "warmup_steps": 1, "learning_rate": 1e-3},
        "fold": {"num_images": 8},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.fixture(name="write_tiny_options", scope="session")
def _write_tiny_options() -> Callable[..., Path]:
    """The function above: `write_tiny_options(path, shards, **run)`."""
    return write_tiny_options


def write_tiny_unet_options(path: Path, pictures: Path, model: Path, **run) -> Path:
    """A config of stage 2 at `path`: the tiny model's UNet, on pictures; for the run folder `run` beside it. `run`: options of the run."""
    options = {
        "stage": "diffusion",
        "init": "pretrained",
        "model": str(model),
        "vae": str(model),
        "data": {"train": str(pictures), "val": str(pictures), "batch_size": 4, "num_workers": 0, "val_samples": 8},
        "run": {"precision": "32-true", "accelerator": "cpu", "dir": str(path.parent / "run"), "log_every": 1, **run},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "ema_decay": 0.5, "clip_norm": 0.1},
    }
    path.write_text(yaml.safe_dump(options))
    return path


@pytest.fixture(name="write_tiny_unet_options", scope="session")
def _write_tiny_unet_options() -> Callable[..., Path]:
    """The function above: `write_tiny_unet_options(path, pictures, model, **run)`."""
    return write_tiny_unet_options


def smooth_picture(seed: int = 0, side: int = 64) -> torch.Tensor:
    """A picture [3, side, side] in [-1, 1] of soft colours, without symmetry."""
    patches = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(patches, (side, side), mode="bicubic").clamp(-1, 1)[0]


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs a Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
