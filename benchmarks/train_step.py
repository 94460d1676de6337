"""Training steps of full size on one device: pictures/s, share of the device's peak, and memory, by the options for speed.

    python benchmarks/train_step.py --out DIR

makes, once, a model of Stable Diffusion 1.5's size with random weights, pictures and latents under DIR, then trains a few steps of each row
below (those of configs/sd15/vae_d4.yaml and unet_full.yaml, at 256 px). A row is train.py itself with these options: reading, losses, EMA
and logging are in its figures, the first steps are not. A second call goes on; `--only` runs some rows. Writes DIR/table.md.

On a CPU it shows that it works: give a small model (--model) and small pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torchvision.models import VGG16_Weights, vgg16

from eqldm.budget import STABLE_DIFFUSION
from eqldm.data.shards import MANIFEST, write_manifest, write_shard
from eqldm.diffusion.conditioning import make_text_encoder, make_tokenizer
from eqldm.model_folder import save_model_folder
from steps import call, encode, last, logged, path, shards, table

CAPTION = "a picture of coloured clouds"
VAE, UNET = "configs/sd15/vae_d4.yaml", "configs/sd15/unet_full.yaml"
FAST = ["run.precision=bf16-mixed", "run.channels_last=true", "run.compile=true"]
PLAIN = ["run.precision=32-true", "run.channels_last=false", "run.compile=false"]
ROWS = {  # name: config, options
    "vae, plain": (VAE, PLAIN),
    "vae, bf16": (VAE, [FAST[0], *PLAIN[1:]]),
    "vae, bf16, channels_last": (VAE, [*FAST[:2], PLAIN[2]]),
    "vae, bf16, channels_last, compile": (VAE, [*FAST, "equivariance.rescale_prob=0"]),
    "unet, plain": (UNET, PLAIN),
    "unet, bf16": (UNET, [FAST[0], *PLAIN[1:]]),
    "unet, bf16, channels_last": (UNET, [*FAST[:2], PLAIN[2]]),
    "unet, bf16, compile": (UNET, [FAST[0], PLAIN[1], FAST[2]]),
    "unet, bf16, channels_last, compile": (UNET, FAST),
    "unet, bf16, channels_last, checkpointing": (UNET, [*FAST[:2], PLAIN[2], "gradient_checkpointing=true"]),
    "unet, bf16, channels_last, zero2": (UNET, [*FAST[:2], PLAIN[2], "run.strategy=zero2"]),
}


def make_model(folder: Path) -> Path:
    """Stable Diffusion 1.5's networks with random weights."""
    if not folder.is_dir():
        torch.manual_seed(0)
        tokenizer = make_tokenizer([CAPTION])
        tokenizer.model_max_length = 77
        text = {
            name: size for name, size in STABLE_DIFFUSION["text_encoder"].items() if name not in ("vocab_size", "max_position_embeddings")
        }
        save_model_folder(
            folder,
            vae=AutoencoderKL(**STABLE_DIFFUSION["vae"], sample_size=512),
            unet=UNet2DConditionModel(**STABLE_DIFFUSION["unet"], sample_size=64, cross_attention_dim=text["hidden_size"]),
            tokenizer=tokenizer,
            text_encoder=make_text_encoder(tokenizer, **text),
            scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        )
    return folder


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


def make_vgg(home: Path) -> None:
    """Random weights for LPIPS where torch's hub folder lacks VGG16's: they cost as much."""
    name = Path("checkpoints") / Path(VGG16_Weights.IMAGENET1K_V1.url).name
    if not (Path(torch.hub.get_dir()) / name).is_file():
        os.environ["TORCH_HOME"] = str(home)
        target = home / "hub" / name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(vgg16().state_dict(), target)


def measured(run: Path) -> dict[str, float]:
    """The medians of what a run logged, its first third left out: compilation, and memory that is still to be found."""
    rows = logged(run, "train/samples_per_second")
    rows = rows[len(rows) // 3 :]
    found = {}
    for name in ("train/samples_per_second", "train/mfu", "train/max_memory_gb"):
        values = [float(row[name]) for row in rows if row.get(name)]
        if values:
            found[name] = statistics.median(values)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path, required=True)
    parser.add_argument("--model", type=path, help="model folder to start from (default: one of full size, made here)")
    parser.add_argument("--size", type=int, default=256, help="of the pictures, px")
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--vae-batch", type=int, default=10)
    parser.add_argument("--unet-batch", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further options of every row")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    make_vgg(args.out / "torch")
    model = args.model or make_model(args.out / "model")
    pictures = make_pictures(args.out / "pictures", args.num_images, args.size)
    latents = args.out / "latents"
    if any(ROWS[name][0] == UNET for name in args.only):
        encode(pictures, model, latents, "--prompt-embeds", "--bf16")
    store = args.out / "results.json"
    results = json.loads(store.read_text()) if store.is_file() else {}
    for name in (name for name in args.only if name not in results):
        config, options = ROWS[name]
        vae, run = config == VAE, args.out / "run"
        shutil.rmtree(run, ignore_errors=True)  # of a row that was stopped
        batch = args.vae_batch if vae else args.unet_batch
        own = ["fold.num_images=0", "fold.align_to=null", "loss.adversarial_start=0"] if vae else [f"vae={model}", "sample_prompts=[]"]
        steps = [
            f"run.num_steps={args.num_steps}",
            f"run.log_every={max(1, args.num_steps // 12)}",
            "run.devices=1",
            "optimizer.warmup_steps=0",
        ]
        never = [f"run.{key}={10 * args.num_steps}" for key in ("val_every", "checkpoint_every")]
        sizes = [f"data.image_size={args.size}", f"data.batch_size={batch}", f"data.micro_batch_size={batch}", "data.val_samples=1"]
        where = [f"run.dir={run}", f"model={model}", *shards(pictures if vae else latents), *([] if vae else ["boundary_steps=0"])]
        call("train.py", config, *last([*where, *own, *steps, *never, *sizes, *options, *args.set]))
        results[name] = measured(run)
        shutil.rmtree(run)  # a checkpoint of full size takes 14 GB
        store.write_text(json.dumps(results, indent=2) + "\n")
        (args.out / "table.md").write_text(report(results))
    print(report({name: results[name] for name in ROWS if name in results}))


if __name__ == "__main__":
    main()
