"""Training steps of full size on one device: pictures/s, share of the device's peak, and memory, by the options for speed.

    python benchmarks/train_step.py --out DIR

trains some steps of each row below, those of configs/sd15/vae_d4.yaml and unet_full.yaml at 256 px, on networks of Stable Diffusion 1.5's
size with random weights, pictures and latents, which take as long as real ones. It is the training of train.py: its module, data, trainer,
EMA and logs. But no model is read first, the first third of the steps is left out of the figures, and no checkpoint is written.
A second call goes on; `--only` runs some rows. Writes DIR/table.md.

On a CPU it shows that it works: give a small model (--model) and small pictures.
"""

from __future__ import annotations

import gc
import io
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torchvision.models import VGG16_Weights, vgg16

from eqldm.autoencoder.module import Autoencoder
from eqldm.budget import STABLE_DIFFUSION, operations
from eqldm.config import AutoencoderConfig, DiffusionConfig, load_config
from eqldm.data.module import ShardData
from eqldm.data.samples import pack_array
from eqldm.data.shards import MANIFEST, write_manifest, write_shard
from eqldm.diffusion.conditioning import make_text_encoder, make_tokenizer
from eqldm.diffusion.module import LatentDiffusion
from eqldm.model_folder import Networks, downsampling, load_vae
from eqldm.training.callbacks import SaveLast
from eqldm.training.speed import Utilisation
from eqldm.training.trainer import make_trainer
from steps import ROOT, last, logged, path, print_table, script, shards, table

CAPTION = "a picture of coloured clouds"
VAE, UNET = "configs/sd15/vae_d4.yaml", "configs/sd15/unet_full.yaml"
FAST = ["run.precision=bf16-mixed", "run.channels_last=true", "run.compile=true"]
PLAIN = ["run.precision=32-true", "run.channels_last=false", "run.compile=false"]
ONE_SIZE = ["equivariance.rescale_prob=0"]  # in all rows alike: latents of many sizes are compiled many times
RANDOM = "random"  # what stands for the VAE's hash: the latents are of none
ROWS = {  # name: config, options
    "vae, plain": (VAE, [*PLAIN, *ONE_SIZE]),
    "vae, bf16": (VAE, [FAST[0], *PLAIN[1:], *ONE_SIZE]),
    "vae, bf16, channels_last": (VAE, [*FAST[:2], PLAIN[2], *ONE_SIZE]),
    "vae, bf16, channels_last, compile": (VAE, [*FAST, *ONE_SIZE]),
    "unet, plain": (UNET, PLAIN),
    "unet, bf16": (UNET, [FAST[0], *PLAIN[1:]]),
    "unet, bf16, channels_last": (UNET, [*FAST[:2], PLAIN[2]]),
    "unet, bf16, compile": (UNET, [FAST[0], PLAIN[1], FAST[2]]),
    "unet, bf16, channels_last, compile": (UNET, FAST),
    "unet, bf16, checkpointing": (UNET, [FAST[0], *PLAIN[1:], "gradient_checkpointing=true"]),
    "unet, bf16, zero2": (UNET, [FAST[0], *PLAIN[1:], "run.strategy=zero2"]),
}


def make_networks(model: Path | None, device: str | torch.device = "cpu") -> tuple[Networks, AutoencoderKL]:
    """Those of a model folder; without one of Stable Diffusion 1.5's size with random weights, made on the device, which takes seconds."""
    if model:
        return Networks.open(model), load_vae(model)
    torch.manual_seed(0)
    tokenizer = make_tokenizer([CAPTION])
    tokenizer.model_max_length = STABLE_DIFFUSION["text_encoder"]["max_position_embeddings"]
    text = {name: size for name, size in STABLE_DIFFUSION["text_encoder"].items() if name not in ("vocab_size", "max_position_embeddings")}
    with torch.device(device):
        vae = AutoencoderKL(**STABLE_DIFFUSION["vae"], sample_size=512)
        unet = UNet2DConditionModel(**STABLE_DIFFUSION["unet"], sample_size=64, cross_attention_dim=text["hidden_size"])
    text_encoder = make_text_encoder(tokenizer, **text).to(device)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    return Networks(unet, tokenizer, text_encoder, scheduler), vae


def make_pictures(folder: Path, count: int, size: int) -> Path:
    """`train` and `val` of coloured clouds."""
    for split in ("train", "val"):
        if not (folder / split / MANIFEST).is_file():
            (folder / split).mkdir(parents=True, exist_ok=True)
            entry = write_shard(folder / split / f"{split}-000000.tar", clouds(count, size))
            write_manifest(folder / split, [entry], kind="pictures")
    return folder


def clouds(count: int, size: int) -> Iterator[dict]:
    """Samples of pictures, in the form `write_shard` takes."""
    random = np.random.default_rng(0)
    for number in range(count):
        colours = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        colours.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        yield {"__key__": f"{number:06d}", "jpg": buffer.getvalue(), "txt": CAPTION}


def make_latents(folder: Path, count: int, cells: int, vae: AutoencoderKL, networks: Networks) -> Path:
    """`train` and `val` of random latents [C, cells, cells] with prompt embeddings, in float16, as data/encode_latents.py writes them."""
    generator = torch.Generator().manual_seed(0)
    channels, text = vae.config.latent_channels, networks.text_encoder.config
    for split in ("train", "val"):
        if not (folder / split / MANIFEST).is_file():
            (folder / split).mkdir(parents=True, exist_ok=True)
            samples = (
                {
                    "__key__": f"{number:06d}",
                    "moments.npy": pack_array(torch.randn(2 * channels, cells, cells, generator=generator).half()),
                    "txt": CAPTION,
                    "prompt_embeds.npy": pack_array(
                        torch.randn(networks.tokenizer.model_max_length, text.hidden_size, generator=generator).half()
                    ),
                }
                for number in range(count)
            )
            write_manifest(folder / split, [write_shard(folder / split / f"{split}-000000.tar", samples)], kind="latents", vae_hash=RANDOM)
    return folder


def make_vgg(home: Path) -> None:
    """Random weights for LPIPS where torch's hub folder lacks VGG16's: they cost as much."""
    name = Path("checkpoints") / Path(VGG16_Weights.IMAGENET1K_V1.url).name
    if not (Path(torch.hub.get_dir()) / name).is_file():
        os.environ["TORCH_HOME"] = str(home)
        target = home / "hub" / name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(vgg16().state_dict(), target)


class Enough(Callback):
    """Ends a training so many seconds after its second step: the first ones compile, and find memory."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 2 and not self.start:
            self.start = time.perf_counter()
        if self.start and time.perf_counter() - self.start > self.seconds:
            trainer.should_stop = True


def row_config(
    row: tuple[str, Sequence[str]], size: int, batch: int, num_steps: int, folder: Path, model: Path | None, overrides: Sequence[str] = ()
) -> AutoencoderConfig | DiffusionConfig:
    """The options of a row, of pictures of `size` px, `batch` at a time, from `folder`'s pictures or latents, for its run."""
    config, options = row
    data, never = folder / (f"pictures-{size}" if config == VAE else f"latents-{size}"), 10 * num_steps
    own = (
        ["fold.num_images=0", "fold.align_to=null", "loss.adversarial_start=0"]
        if config == VAE
        else ["sample_prompts=[]", "boundary_steps=0"]
    )
    models = [f"model={model}", *([] if config == VAE else [f"vae={model}"])] if model else []
    steps = [
        f"run.num_steps={num_steps}",
        f"run.log_every={max(1, num_steps // 12)}",
        f"run.val_every={never}",
        f"run.checkpoint_every={never}",
    ]
    sizes = [f"data.image_size={size}", f"data.batch_size={batch}", f"data.micro_batch_size={batch}", "data.val_samples=1", "run.devices=1"]
    small = ["optimizer.warmup_steps=0", "optimizer.learning_rate=1e-6"]  # random weights must not run away
    found = load_config(
        ROOT / config, last([*shards(data), f"run.dir={folder / 'run'}", *models, *own, *steps, *sizes, *small, *options, *overrides])
    )
    assert isinstance(found, AutoencoderConfig | DiffusionConfig)
    return found


def make_data(config: AutoencoderConfig | DiffusionConfig, count: int, vae: AutoencoderKL, networks: Networks) -> None:
    """What a row trains on, unless it is there."""
    folder, size = Path(config.data.train).parent, config.data.image_size
    assert size is not None
    if isinstance(config, AutoencoderConfig):
        make_pictures(folder, count, size)
    else:
        make_latents(folder, count, size // downsampling(vae), vae, networks)


def train_row(
    config: AutoencoderConfig | DiffusionConfig, vae: AutoencoderKL, networks: Networks, seconds: float = math.inf,
    per_picture: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """What `measured` finds of a row's training, of at most so many seconds after its second step.

    per_picture: floating-point operations of a step, for MFU.  Raises torch.OutOfMemoryError.
    """
    run = Path(config.run.dir)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    callbacks = [Utilisation(per_picture or math.nan), Enough(seconds)]
    if isinstance(config, AutoencoderConfig):
        module, data = Autoencoder(config, vae.train()), ShardData(config)
        trainer = make_trainer(config, False, callbacks, unused_parameters=module.discriminator is not None)
    else:
        networks.text_encoder.requires_grad_(False)
        if config.gradient_checkpointing:
            networks.unet.enable_gradient_checkpointing()
        module, data = LatentDiffusion(config, vae, networks), ShardData(config, need_captions=True, vae_hash=RANDOM)
        data.draws = module.draws(data.train_samples)
        trainer = make_trainer(config, True, callbacks)
    trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, SaveLast)]
    trainer.limit_val_batches = 0
    trainer.strategy.teardown = lambda: None  # which would copy weights and moments to the CPU: seconds, and nobody wants them
    try:
        trainer.fit(module, data)
        return measured(run)
    finally:
        shutil.rmtree(run, ignore_errors=True)


def release() -> None:
    """Frees what the row before has taken of the device, and forgets what it has compiled."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measured(run: Path) -> dict[str, float]:
    """The medians of what a run logged, its first third left out, and its first line where there are more: the start of readers,
    compilation, and memory that is still to be found.

    Raises ValueError where it logged nothing."""
    rows = logged(run, "train/samples_per_second")
    rows = rows[max(len(rows) // 3, min(1, len(rows) - 1)) :]
    found = {}
    for name in ("train/samples_per_second", "train/mfu", "train/max_memory_gb"):
        values = [float(row[name]) for row in rows if row.get(name) and math.isfinite(float(row[name]))]
        if values:
            found[name] = statistics.median(values)
    if not found:
        raise ValueError("there was no time for the steps of a line of the log")
    return found


def report(results: dict[str, dict[str, float]]) -> str:
    rows = {}
    for name, found in results.items():
        rate, plain = found["train/samples_per_second"], results.get(f"{name.split(',')[0]}, plain")
        ratio = f"{rate / plain['train/samples_per_second']:.2f}" if plain else "-"
        mfu, memory = (
            f"{found[key]:{form}}" if key in found else "-" for key, form in (("train/mfu", ".1%"), ("train/max_memory_gb", ".1f"))
        )
        rows[name] = [f"{rate:.1f}", ratio, mfu, memory]
    return table("", ["pictures/s", "times plain", "MFU", "GB"], rows)


@cache
def per_picture(config: str, size: int, model: Path | None) -> float:
    """Floating-point operations of a row's step, whatever its options for speed."""
    return operations(row_config((config, []), size, 1, 1, Path("none"), model))


def run(args) -> str:
    """Trains the rows that are not in the table yet; returns it."""
    args.out.mkdir(parents=True, exist_ok=True)
    make_vgg(args.out / "torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = args.out / "results.json"
    results = json.loads(store.read_text()) if store.is_file() else {}
    for name in (name for name in args.only if name not in results):
        print(f"{name} ...", flush=True)
        row, (networks, vae) = ROWS[name], make_networks(args.model, device)
        batch = args.vae_batch if row[0] == VAE else args.unet_batch
        config = row_config(row, args.size, batch, args.num_steps, args.out, args.model, args.set)
        make_data(config, args.num_images, vae, networks)
        results[name] = train_row(config, vae, networks, per_picture=per_picture(row[0], args.size, args.model))
        del networks, vae
        release()
        store.write_text(json.dumps(results, indent=2) + "\n")
        (args.out / "table.md").write_text(report(results))
    return report({name: results[name] for name in ROWS if name in results})


def main() -> None:
    parser = script(__doc__)
    parser.add_argument("--out", type=path, required=True)
    parser.add_argument("--model", type=path, help="model folder to start from (default: one of full size, made here)")
    parser.add_argument("--size", type=int, default=256, help="of the pictures, px")
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--vae-batch", type=int, default=10)
    parser.add_argument("--unet-batch", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further options of every row")
    print_table(parser, run)


if __name__ == "__main__":
    main()
