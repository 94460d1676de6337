"""A sampling job: options in, a folder of pictures with everything needed to make them again out."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.progress import Progress

import eqldm
from eqldm.anagram.render import anagram_sheet
from eqldm.anagram.sampling import Sampler
from eqldm.data.samples import tensor_to_picture
from eqldm.data.shards import write_json
from eqldm.model_folder import vae_hash
from eqldm.views import parse_view


def sample_to_folder(args: argparse.Namespace) -> Path:
    """Samples as `sample.py` asks for it; writes `SEED.png`, `SEED.json` and `sheet.png`, whose path is returned.

    Raises: ValueError for options that do not fit each other or the model; FileNotFoundError for a folder that is no model.
    """
    if args.num_samples < 1 or args.batch_size < 1 or args.num_inference_steps < 1:
        raise ValueError("--num-samples, --batch-size and --num-inference-steps must be at least 1")
    views = [parse_view(name) for name in args.views]
    sampler = Sampler.open(args.model, args.device)
    sampler.check(args.prompts, views, args.image_size)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    seeds = list(range(args.seed, args.seed + args.num_samples))
    settings = {
        "model": str(args.model),
        "vae_hash": vae_hash(sampler.vae),
        "prompts": args.prompts,
        "views": [view.name for view in views],
        "negative_prompt": args.negative_prompt,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "reduction": args.reduction,
        "scheduler": args.scheduler or type(sampler.networks.scheduler).__name__,
        "image_size": args.image_size,
        "versions": {"eqldm": eqldm.__version__, "torch": torch.__version__},
    }
    pictures, start = [], time.perf_counter()
    batches = [seeds[i : i + args.batch_size] for i in range(0, len(seeds), args.batch_size)]
    with Progress(transient=True) as progress:
        task = progress.add_task("sampling", total=len(batches) * args.num_inference_steps)
        for batch in batches:
            z = sampler(
                args.prompts,
                views,
                batch,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                negative_prompt=args.negative_prompt,
                reduction=args.reduction,
                scheduler=args.scheduler,
                image_size=args.image_size,
                on_step=lambda: progress.advance(task),
            )
            for seed, picture in zip(batch, sampler.decode(z)):
                tensor_to_picture(picture).save(out / f"{seed}.png")
                write_json(out / f"{seed}.json", {**settings, "seed": seed, "command": command(settings, seed)})
                pictures.append(picture)
    seconds = (time.perf_counter() - start) / len(seeds)
    sheet = out / "sheet.png"
    anagram_sheet(torch.stack(pictures), seeds, args.prompts, views).save(sheet)
    print(f"{len(seeds)} pictures, {seconds:.2f} s a picture")
    return sheet


def command(settings: dict, seed: int) -> str:
    """The command that makes one picture again."""
    words = ["python sample.py --model", json.dumps(settings["model"]), "--prompts", *map(json.dumps, settings["prompts"])]
    words += ["--views", *settings["views"], f"--seed {seed} --num-samples 1"]
    words += [f"--num-inference-steps {settings['num_inference_steps']} --guidance-scale {settings['guidance_scale']}"]
    words += [f"--reduction {settings['reduction']}"]
    if settings["negative_prompt"]:
        words += ["--negative-prompt", json.dumps(settings["negative_prompt"])]
    if not settings["scheduler"].endswith("Scheduler"):
        words += ["--scheduler", settings["scheduler"]]
    if settings["image_size"]:
        words += [f"--image-size {settings['image_size']}"]
    return " ".join([*words, "--out DIR"])
