"""Evaluate model folders: python -m eqldm.evaluate MODEL [MODEL ...] --data SHARDS --out DIR

Each MODEL is a diffusers folder, whole or with a VAE alone (what needs a UNet is then listed as not computed). Writes
DIR/NAME/metrics.json and picture sheets for each; with all of them side by side DIR/report.md, DIR/equivariance.png (what turned
latents decode to, turned back) and DIR/models.png (the same letters and anagrams).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from rich.console import Console
from rich.progress import Progress

from eqldm.anagram.sampling import Sampler
from eqldm.data.samples import PictureSamples, collate
from eqldm.data.shards import write_json
from eqldm.evaluation.anagram import Reading, anagram_metrics, generation_metrics, letter_pairs, plain_letters, read_letters
from eqldm.evaluation.equivariance import equivariance_metrics
from eqldm.evaluation.fit import fit_metrics
from eqldm.evaluation.judge import SHIPPED, Judge
from eqldm.evaluation.quality import RealPictures, quality_metrics
from eqldm.evaluation.reconstruction import reconstruction_metrics
from eqldm.evaluation.report import console_table, equivariance_sheet, models_sheet, reading_sheet, turned_decodings, write_report
from eqldm.model_folder import Pixels, downsampling, load_autoencoder, vae_hash
from eqldm.training.run_folder import versions
from eqldm.views import D4, IDENTITY, View, parse_view


def evaluate_vae(
    vae: AutoencoderKL, pictures: torch.Tensor, views: list[View], batch_size: int
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Reconstruction, and equivariance under D4 and any further `views`, and the `turned_decodings` of some pictures."""
    symmetries = [view for view in D4 if view != IDENTITY]
    more = [view for view in dict.fromkeys(views) if view not in D4]
    for view in more:  # before anything long
        view.check(*(side // downsampling(vae) for side in pictures.shape[-2:]), " (latents)")
    metrics = reconstruction_metrics(vae, pictures, batch_size) | equivariance_metrics(vae, pictures, symmetries, batch_size)
    if more:  # the means stay those of D4, so that they compare whatever views are asked for
        metrics = metrics | equivariance_metrics(vae, pictures, more, batch_size) | metrics
    return metrics, turned_decodings(vae, pictures[:4], [*symmetries, *more])


def evaluate_unet(
    folder: Path, out: Path, samples: PictureSamples, judge: Judge | None, real: RealPictures | None, views: list[View],
    args: argparse.Namespace,
) -> tuple[dict[str, float], list[tuple[list[View], Reading]]]:  # fmt: skip
    """Fit and, with a judge and what it saw of real pictures, generation and anagrams, and the pictures behind them; writes
    `letters.png`, `anagrams_VIEW.png`."""
    sampler = Sampler.open(folder, args.device)
    metrics = fit_metrics(sampler, samples, min(args.num_images, len(samples)), args.batch_size)
    readings: list[tuple[list[View], Reading]] = []
    if judge is None:
        return metrics, readings
    for view in views:  # before anything long
        sampler.check(["", ""], [IDENTITY, view])
    quality = partial(quality_metrics, judge=judge, vae=sampler.vae, real=real, batch_size=args.batch_size)
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale, "batch_size": args.batch_size}
    jobs = [([IDENTITY], plain_letters(args.num_letters), out / "letters.png")]
    jobs += [([IDENTITY, view], letter_pairs(args.num_pairs), out / f"anagrams_{_file_name(view)}.png") for view in views]
    with Progress(transient=True) as progress:
        steps = sum(-(-wanted.shape[1] // args.batch_size) for _, wanted, _ in jobs) * args.num_inference_steps
        task = progress.add_task(f"sampling {folder}", total=steps)
        for job_views, wanted, path in jobs:
            reading = read_letters(sampler, judge, job_views, wanted, on_step=lambda: progress.advance(task), **options)
            reading_sheet(reading, job_views).save(path)
            readings.append((job_views, reading))
            metrics |= generation_metrics(reading, quality) if len(job_views) == 1 else anagram_metrics(job_views[1], reading, quality)
    return metrics, readings


def evaluate(args: argparse.Namespace) -> Path:
    """Evaluate every model; returns the path of the report."""
    for option in ("num_images", "num_letters", "num_pairs", "num_inference_steps", "batch_size"):
        least = 2 if option in ("num_images", "num_letters", "num_pairs") else 1  # a distribution takes two
        if getattr(args, option) < least:
            raise ValueError(f"--{option.replace('_', '-')}: got {getattr(args, option)}, wanted at least {least}")
    views = [parse_view(name) for name in args.views]
    out, notes = Path(args.out), []
    samples = PictureSamples(args.data)
    count = min(args.num_images, len(samples))
    found = collate([samples[i] for i in range(count)])
    pictures, labels = found["x"].to(args.device), found["label"]
    unreadable = dict.fromkeys(found["skipped"])
    if unreadable:
        notes.append(f"{len(unreadable)} pictures cannot be read, the next one stands in for each: {', '.join(unreadable)}.")
    judge = None
    if args.judge == "none":
        notes.append("Not computed: what the judge reads (--judge none).")
    elif args.judge or SHIPPED.is_dir():
        judge = Judge.open(args.judge)
    else:
        notes.append("Not computed: what the judge reads (no judge: give --judge FOLDER, trained by configs/glyphs/judge.yaml).")
    real = None if judge is None else RealPictures.of(pictures.cpu(), judge, labels)
    results, decodings, readings = {}, {}, {}
    for name, folder in zip(model_names(args.models), map(Path, args.models)):
        (out / name).mkdir(parents=True, exist_ok=True)
        vae = load_autoencoder(folder).to(pictures.device)
        if isinstance(vae, Pixels):
            metrics = {}
            notes.append(f"Not computed for {name}: reconstruction, equivariance ('{folder}' is a pixel model, it has no VAE).")
        else:
            metrics, decodings[name] = evaluate_vae(vae, pictures, views, args.batch_size)
        if (folder / "unet").is_dir():
            of_unet, readings[name] = evaluate_unet(folder, out / name, samples, judge, real, views, args)
            metrics |= of_unet
        else:
            notes.append(f"Not computed for {name}: fit, generation, anagrams ('{folder}' holds a VAE alone).")
        if judge is not None and bool((labels >= 0).all()):
            metrics["judge/accuracy"] = float((judge(pictures.cpu(), args.batch_size) == labels).float().mean())
        results[name] = metrics
        write_json(out / name / "metrics.json", metrics)
        about = {**vars(args), "vae_hash": vae_hash(vae), "num_images": count, "versions": versions()}
        (out / name / "about.json").write_text(json.dumps(about, indent=2, default=str) + "\n")
    if decodings:
        equivariance_sheet(decodings).save(out / "equivariance.png")
    if judge is not None and readings:
        models_sheet(readings).save(out / "models.png")
    notes.append(f"{count} pictures of `{args.data}`; command: `{shlex.join(['python', '-m', 'eqldm.evaluate', *sys.argv[1:]])}`.")
    report = write_report(out, results, notes)
    Console().print(console_table(results, f"{count} pictures of {args.data}"))
    return report


def model_names(folders: list[str]) -> list[str]:
    """What the report calls each model: the run or folder it lies in, with as many parents as tell them apart."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    parts = [(path.parent if path.name == "model" else path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a model is given twice: {', '.join(folders)}")


def _file_name(view: View) -> str:
    return view.name.replace(":", "-").replace("@", "+")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folder, whole or with vae/ alone")
    parser.add_argument("--data", required=True, help="shard folder of held-out pictures, or the address of one")
    parser.add_argument("--out", required=True, help="folder for reports")
    parser.add_argument("--judge", help="judge folder, or none (pictures that are no letters); default: the shipped one, if any")
    parser.add_argument("--views", nargs="+", default=["rotate_180"], help="second views of the anagrams; also of the equivariance")
    parser.add_argument("--num-images", type=int, default=512, help="pictures for reconstruction, equivariance and fit")
    parser.add_argument("--num-letters", type=int, default=256, help="letters sampled plainly")
    parser.add_argument("--num-pairs", type=int, default=128, help="letter pairs sampled as anagrams, for each view")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures computed together, for metrics and for sampling")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    try:
        print(f"report: {evaluate(parse_args())}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
