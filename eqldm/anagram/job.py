"""A sampling job: options in, a folder of pictures with everything needed to make them again out."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import Progress

import eqldm
from eqldm.anagram.render import anagram_sheet
from eqldm.anagram.sampling import Sampler
from eqldm.data.samples import tensor_to_picture
from eqldm.model_folder import PRETRAINED, vae_hash, weights_hash
from eqldm.views import parse_view

DEFAULT = "glyphs-eq"
"""The shipped model that samples where none is given."""


def sample_to_folder(args: argparse.Namespace) -> Path:
    """Samples as `sample.py` asks for it; writes `SEED.png`, `SEED.json` and `sheet.png`, whose path is returned.

    Raises: ValueError for options that do not fit each other or the model; FileNotFoundError for a folder that is no model;
    OSError where `--out` cannot be written.
    """
    if args.num_samples < 1 or args.batch_size < 1 or args.num_inference_steps < 1:
        raise ValueError("--num-samples, --batch-size and --num-inference-steps must be at least 1")
    model = args.model or PRETRAINED / DEFAULT
    sampler = Sampler.open(model, args.device)
    side = sampler.side(args.image_size)
    views = [parse_view(name, side) for name in args.views]
    sampler.check(args.prompts, views, args.image_size)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"folder '{out}' cannot be made ({error.strerror}): give another --out") from error

    seeds = list(range(args.seed, args.seed + args.num_samples))
    settings = {
        "model": str(model),
        "vae_hash": vae_hash(sampler.vae),
        "unet_hash": weights_hash(sampler.networks.unet),
        "prompts": args.prompts,
        "views": [view.name for view in views],
        "negative_prompt": args.negative_prompt,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "reduction": args.reduction,
        "blend": args.blend,
        "scheduler": args.scheduler or type(sampler.networks.scheduler).__name__,
        "image_size": args.image_size,
        "device": str(sampler.device),
        "versions": {"eqldm": eqldm.__version__, "torch": torch.__version__},
    }
    pictures, start = [], time.perf_counter()
    batches = [seeds[i : i + args.batch_size] for i in range(0, len(seeds), args.batch_size)]
    with Progress(transient=True) as progress:
        task = progress.add_task("sampling", total=len(batches) * args.num_inference_steps)
        for batch in batches:
            made = sampler(
                args.prompts,
                views,
                batch,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                negative_prompt=args.negative_prompt,
                reduction=args.reduction,
                blend=args.blend,
                scheduler=args.scheduler,
                image_size=args.image_size,
                on_step=lambda: progress.advance(task),
            )
            for seed, picture in zip(batch, made):
                with _writing(out / f"{seed}.png") as path:
                    tensor_to_picture(picture).save(path, "png")
                with _writing(out / f"{seed}.json") as path:
                    path.write_text(json.dumps({**settings, "seed": seed, "command": command(settings, batch)}, indent=2) + "\n")
                pictures.append(picture)
    seconds = (time.perf_counter() - start) / len(seeds)
    sheet = out / "sheet.png"
    with _writing(sheet) as path:
        anagram_sheet(torch.stack(pictures), seeds, args.prompts, views).save(path, "png")
    print(f"{len(seeds)} pictures, {seconds:.2f} s a picture")
    return sheet


def command(settings: dict, batch: Sequence[int]) -> str:
    """The command that makes a batch of seeds again, byte for byte; a batch of another size rounds floats differently."""
    options = {
        "--prompts": settings["prompts"],
        "--views": settings["views"],
        "--seed": [batch[0]],
        "--num-samples": [len(batch)],
        "--batch-size": [len(batch)],
        "--num-inference-steps": [settings["num_inference_steps"]],
        "--guidance-scale": [settings["guidance_scale"]],
        "--reduction": [settings["reduction"]],
        "--blend": [settings["blend"]],
        "--device": [settings["device"]],
    }
    if settings["model"] != str(PRETRAINED / DEFAULT):
        options = {"--model": [settings["model"]], **options}
    if settings["negative_prompt"]:
        options["--negative-prompt"] = [settings["negative_prompt"]]
    if not settings["scheduler"].endswith("Scheduler"):
        options["--scheduler"] = [settings["scheduler"]]
    if settings["image_size"]:
        options["--image-size"] = [settings["image_size"]]
    words = [word for name, values in options.items() for word in (name, *map(str, values))]
    return shlex.join(["python", "sample.py", *words, "--out", "DIR"])


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Where to write the file: beside its name, to which it is renamed when whole. Raises OSError that names it."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"'{path}' cannot be written ({error.strerror or error}): make room, or give another --out") from error
