"""Anagrams of letters, method by method, on the same letters and seeds.

    python benchmarks/anagrams.py base=FOLDER blend=FOLDER@blend=pixels eq=FOLDER --views identity rotate_180 --num-seeds 4 \
        --real SHARDS --chooser FOLDER --out DIR

A method is written as `python -m eqldm.evaluate` takes models; sampling options that it leaves out are the same for all. Each makes
picture number i of every tuple of letters (`--tuples all`: each ordered pair, equal letters too) from the same seed. Pictures are kept
under DIR/NAME, so that a stopped run goes on, and a later one adds methods or seeds. Writes DIR/metrics.json, DIR/table.md,
DIR/methods.png, for each method DIR/failures_NAME.png and, for all pairs, DIR/matrix_NAME.png.

best_of_K is the picture that another judge likes best of a tuple's K, read by the judge: --chooser, which
`python train.py configs/glyphs/judge.yaml run.seed=101 data.train=... data.val=... run.dir=...` trains on glyphs of another seed.
Figures named forced_ are those of a judge that must name one of the 26 letters, as the literature's must (arXiv 2306.12049); the
others may answer that it is none. Intervals are 95 %, resampled over sets of letters (real pictures are not), paired between methods.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqldm.anagram.sampling import Sampler
from eqldm.data.samples import PictureSamples, from_bytes, to_bytes
from eqldm.data.shards import write_json
from eqldm.evaluation.anagram import Reading, every_pair, letter_tuples, unordered
from eqldm.evaluation.bootstrap import bootstrap_weights, interval, weighted_mean
from eqldm.evaluation.entries import Entry, parse_entries
from eqldm.evaluation.features import judge_features
from eqldm.evaluation.generation import letter_prompts
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.evaluation.quality import RealData, RealPictures, fid, high_frequency_energy, kid, round_trip_psnr
from eqldm.evaluation.sheets import letter_matrix, models_sheet, reading_sheet
from eqldm.markdown import markdown
from eqldm.model_folder import Pixels, text_hash, vae_hash, weights_hash
from eqldm.training.speed import native_precision
from eqldm.views import View, parse_view


def read_tuples(which: str, num_views: int) -> Tensor:
    """[T, views] label numbers: every ordered pair, or a fixed draw of so many tuples of different letters."""
    if which == "all":
        if num_views != 2:
            raise ValueError(f"--tuples all: for two views, got {num_views}: give a number of tuples")
        return every_pair()
    return letter_tuples(int(which), num_views).T


def sampling_options(method: Entry, args: argparse.Namespace) -> dict:
    """What a method samples with: its own options, and the rest as all others."""
    common = {"scheduler": None, "reduction": "mean", "blend": "latents"}
    return common | {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps} | method.options


def open_method(method: Entry, views: list[View], args: argparse.Namespace) -> Sampler:
    """The sampler of a method. Raises ValueError, before anything is sampled, where model, views and options do not fit each other,
    or where DIR/NAME holds pictures that were made otherwise."""
    _, sampler = method.open(args.device, native_precision(torch.device(args.device).type))
    if sampler is None:
        raise ValueError(f"'{method.folder}' holds no UNet: wanted a whole model folder")
    options = sampling_options(method, args)
    sampler.check([""] * len(views), views)
    networks, solver = sampler.networks, sampler.solver(options["scheduler"], options["blend"])
    config = {key: value for key, value in solver.config.items() if not key.startswith("_")}
    about = {
        "unet_hash": weights_hash(networks.unet),
        "vae_hash": vae_hash(sampler.vae),
        "text_hash": text_hash(networks.tokenizer, networks.text_encoder),
        "scheduler_config": {"_class_name": type(solver).__name__, **config},
        **options,
        "views": args.views,
        "tuples": args.tuples,
        "batch_size": args.batch_size,
    }
    path = args.out / method.name / "about.json"
    about = json.loads(json.dumps(about, default=str))
    if path.exists() and (before := json.loads(path.read_text())) != about:
        changed = [key for key in about if before.get(key) != about[key]]
        raise ValueError(f"'{path.parent}' holds pictures made with another {', '.join(changed)}: give another NAME or --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, about)
    return sampler


def batches(tuples: Tensor, args: argparse.Namespace) -> list[tuple[int, int]]:
    """(seed round, first tuple) of each file: a round is every tuple once, so that later seeds leave earlier files as they are."""
    return [(k, first) for k in range(args.num_seeds) for first in range(0, len(tuples), args.batch_size)]


def make_pictures(
    method: Entry, sampler: Sampler, views: list[View], tuples: Tensor, args: argparse.Namespace, advance: Callable[[], None]
) -> None:
    """Samples what DIR/NAME lacks, a file for each batch. Tuple j of round k has seed k * tuples + j."""
    for k, first in batches(tuples, args):
        path = args.out / method.name / f"{k:03d}-{first:06d}.safetensors"
        if not path.exists():
            rows = tuples[first : first + args.batch_size]
            seeds = range(k * len(tuples) + first, k * len(tuples) + first + len(rows))
            start = time.perf_counter()
            pictures = sampler(letter_prompts(rows.T), views, seeds, **sampling_options(method, args))
            seconds = time.perf_counter() - start
            save_file({"pictures": to_bytes(pictures), "seconds": torch.tensor(seconds / len(rows))}, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        advance()


def load_pictures(folder: Path, tuples: Tensor, args: argparse.Namespace) -> tuple[Tensor, float]:
    """Pictures [rounds x tuples, 3, H, W] in [-1, 1], and the median seconds a picture."""
    parts = [load_file(folder / f"{k:03d}-{first:06d}.safetensors") for k, first in batches(tuples, args)]
    seconds = torch.stack([part["seconds"] for part in parts]).median()
    return from_bytes(torch.cat([part["pictures"] for part in parts])), float(seconds)


class Measured:
    """What is measured of a method's pictures: by picture and view, so that it can be resampled.

    reading: the pictures, and what the judge read.  forced: the same where it must name a letter.
    chosen: [N] the chooser's probability of the wanted letter in the worst view.
    features: [views, N, D].  energy: [views, N].  round_trip: [N] dB, or None for pixel models.
    """

    def __init__(self, pictures: Tensor, seconds: float, views: list[View], wanted: Tensor, judge: Judge, chooser: Judge, vae):
        seen = [view(pictures) for view in views]
        self.seconds = seconds
        probabilities = torch.stack([judge.probabilities(x) for x in seen])
        self.reading = Reading(pictures, wanted.T, probabilities.argmax(2))
        self.forced = Reading(pictures, wanted.T, probabilities[..., : len(LETTERS)].argmax(2))
        self.chosen = chooser.worst_view(seen, wanted.T)
        self.features = torch.stack([judge.features(x) for x in seen])
        self.energy = torch.stack([high_frequency_energy(x) for x in seen])
        self.round_trip = None if isinstance(vae, Pixels) else round_trip_psnr(vae, pictures)

    def best(self, both: Tensor, num_tuples: int) -> Tensor:
        """[T] of values [N], that of the picture that the chooser likes best of a tuple's seeds."""
        choice = self.chosen.view(-1, num_tuples).argmax(0)
        return both.view(-1, num_tuples)[choice, torch.arange(num_tuples)]


def in_every_view(reading: Reading) -> Tensor:
    """[N] 1 where every view reads right."""
    return reading.right.all(0).double()


def summarise(method: Measured, real: RealPictures, views: list[View], num_tuples: int, weights: Tensor) -> dict:
    """Flat metrics, and the resampled values behind them under `_resampled` for comparisons."""
    tuple_weights = weights[:, :num_tuples]  # the first num_tuples pictures are one of each tuple
    count = weights.shape[1] // num_tuples
    drawn: dict[str, Tensor] = {}
    metrics: dict = {}
    for prefix, reading in (("", method.reading), ("forced_", method.forced)):
        both = in_every_view(reading)
        metrics[f"{prefix}ambigramability"] = float(both.mean())
        drawn[f"{prefix}ambigramability"] = weighted_mean(both, weights)
        if count > 1:
            best = method.best(both, num_tuples)
            metrics[f"{prefix}best_of_{count}"] = float(best.mean())
            drawn[f"{prefix}best_of_{count}"] = weighted_mean(best, tuple_weights)
    each_once = torch.ones_like(weights[:1])
    kids = []
    for i, view in enumerate(views):
        metrics[f"{view.name}/read_right"] = float(method.reading.right[i].double().mean())
        resampled = kid(real.features["judge"], method.features[i], torch.cat([each_once, weights]), real.labels)
        metrics[f"{view.name}/kid"] = float(resampled[0])
        metrics[f"{view.name}/fid"] = float(fid(real.features["judge"], method.features[i]))
        metrics[f"{view.name}/texture"] = float(method.energy[i].mean()) / real.energy
        kids.append(resampled[1:])
    metrics["kid"] = sum(metrics[f"{view.name}/kid"] for view in views) / len(views)
    metrics["texture"] = sum(metrics[f"{view.name}/texture"] for view in views) / len(views)
    drawn["kid"] = torch.stack(kids).mean(0)
    drawn["texture"] = weighted_mean(method.energy.mean(0), weights) / real.energy
    if method.round_trip is not None:
        metrics["round_trip_psnr"] = float(method.round_trip.mean())
    metrics["seconds_per_picture"] = method.seconds
    metrics |= {f"{name}_95": interval(values) for name, values in drawn.items()}
    return {**metrics, "_resampled": drawn}


def failures(method: Measured, views: list[View], count: int, path: Path) -> None:
    """Writes a seeded draw from the pictures that are not read right in every view, if any, to look at: what went wrong?"""
    wrong = (in_every_view(method.reading) == 0).nonzero()[:, 0]
    drawn = wrong[torch.randperm(len(wrong), generator=torch.Generator().manual_seed(0))[:count]]
    path.unlink(missing_ok=True)
    if len(drawn):
        reading_sheet(method.reading.of(drawn), views, count).save(path)


def compare(a: dict, b: dict) -> dict:
    """Of two summaries on the same letters and seeds: what a has more than b, with intervals."""
    result = {}
    for name, values in a["_resampled"].items():
        result[f"{name}_difference"] = a[name] - b[name]
        result[f"{name}_difference_95"] = interval(values - b["_resampled"][name])
    return result


def table(results: dict[str, dict]) -> str:
    """The methods as a Markdown table."""
    names = list(dict.fromkeys(name for metrics in results.values() for name in metrics if not name.endswith("_95")))
    rows = []
    for method, metrics in results.items():
        cells = []
        for name in names:
            value, bounds = metrics.get(name), metrics.get(f"{name}_95")
            text = "-" if value is None else f"{value:.3g}"
            cells.append(text + (f" ({bounds[0]:.3g} to {bounds[1]:.3g})" if bounds else ""))
        rows.append([method, *cells])
    return markdown(["method", *names], rows)


def run(args: argparse.Namespace) -> Path:
    views = [parse_view(name) for name in args.views]
    methods = parse_entries(args.methods)
    tuples = read_tuples(args.tuples, len(views))
    if args.num_seeds < 1 or args.batch_size < 1 or len(tuples) < 20:
        raise ValueError(f"wanted --num-seeds and --batch-size of at least 1, and 20 tuples to resample: got {args.num_seeds}, "
                         f"{args.batch_size} and {len(tuples)}")  # fmt: skip
    wanted = tuples.repeat(args.num_seeds, 1)
    judge, chooser = Judge.open(args.judge), Judge.open(args.chooser)
    if weights_hash(judge.network) == weights_hash(chooser.network):
        raise ValueError("--chooser is the judge itself, which must not choose what it reads: give one trained with another seed")
    samples = PictureSamples(args.real)
    samplers = [open_method(method, views, args) for method in methods]
    real = RealPictures.of(RealData(samples, len(samples), [judge_features(judge)]).measure(range(len(samples))))
    clusters = unordered(tuples).repeat(args.num_seeds)
    weights = bootstrap_weights(clusters, args.num_resamples)
    shown = torch.randperm(len(tuples), generator=torch.Generator().manual_seed(0))[: args.num_shown]
    summaries, readings = {}, {}
    with Progress() as progress:
        for method, sampler in zip(methods, samplers):
            name = method.name
            task = progress.add_task(name, total=len(batches(tuples, args)))
            make_pictures(method, sampler, views, tuples, args, lambda task=task: progress.advance(task))
            pictures, seconds = load_pictures(args.out / name, tuples, args)
            measured = Measured(pictures, seconds, views, wanted, judge, chooser, sampler.vae)
            summaries[name] = summarise(measured, real, views, len(tuples), weights)
            if args.tuples == "all":
                rates = in_every_view(measured.reading).view(args.num_seeds, len(LETTERS), len(LETTERS)).mean(0)
                matrix = letter_matrix(rates, f"{name}: read right in both views", args.views)
                matrix.save(args.out / f"matrix_{name}.png")
            readings[name] = [(views, measured.reading.of(shown))]
            failures(measured, views, args.num_failures, args.out / f"failures_{name}.png")
    if len(shown):
        models_sheet(readings, len(shown), columns=3).save(args.out / "methods.png")
    comparisons = {
        f"{a} against {b}": compare(summaries[a], summaries[b]) for a in summaries for b in summaries if args.against == b and a != b
    }
    results = {name: {k: v for k, v in s.items() if k != "_resampled"} for name, s in summaries.items()}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(args.out / "metrics.json", {"methods": results, "comparisons": comparisons, "options": options})
    text = table(results) + ("\n" + table(comparisons) if comparisons else "")
    (args.out / "table.md").write_text(text)
    print(text)
    return args.out / "table.md"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="[NAME=]MODEL[@OPTION=VALUE,...]")
    parser.add_argument("--views", nargs="+", default=["identity", "rotate_180"])
    parser.add_argument("--tuples", default="all", help="all, or a number of tuples of letters")
    parser.add_argument("--num-seeds", type=int, default=4)
    parser.add_argument("--real", type=Path, required=True, help="picture shards that samples are held against, all of them")
    parser.add_argument("--judge", help="judge folder (default: the shipped one)")
    parser.add_argument("--chooser", required=True, help="another judge's folder, which chooses the best of a tuple's pictures")
    parser.add_argument("--against", help="the method that all others are compared with")
    parser.add_argument("--num-failures", type=int, default=100, help="failed pictures of each method on DIR/failures_NAME.png; 0: none")
    parser.add_argument(
        "--num-shown", type=int, default=12, help="tuples on DIR/methods.png, where the methods stand side by side; 0: none"
    )
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=52)
    parser.add_argument("--num-resamples", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.against is not None and args.against not in [method.name for method in parse_entries(args.methods)]:
        parser.error(f"--against {args.against} is none of the methods")
    return args


def main() -> None:
    try:
        print(run(parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
