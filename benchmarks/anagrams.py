"""Anagrams of letters, method by method, on the same letters and seeds.

    python benchmarks/anagrams.py base=FOLDER blend=FOLDER@pixels eq=FOLDER --views identity rotate_180 --num-seeds 4 \
        --real SHARDS --out DIR

A method is NAME=MODEL, or NAME=MODEL@pixels to blend its views in picture space. Each makes picture number i of every tuple of
letters (`--tuples all`: each ordered pair, equal letters too) from the same seed. Pictures are kept under DIR/NAME, so that a
stopped run goes on, and a later one adds methods or seeds. Writes DIR/metrics.json, DIR/table.md and, for each method and all
pairs, DIR/matrix_NAME.png. Intervals are 95 %, resampled over tuples, paired between methods.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqldm.anagram.sampling import Sampler
from eqldm.data.samples import PictureSamples
from eqldm.data.shards import write_json
from eqldm.evaluation.anagram import letter_pairs
from eqldm.evaluation.bootstrap import bootstrap_weights, interval, weighted_mean
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.evaluation.quality import RealPictures, fid, high_frequency_energy, kid, round_trip_psnr
from eqldm.evaluation.report import letter_matrix
from eqldm.model_folder import Pixels
from eqldm.training.trainer import native_precision
from eqldm.views import View, parse_view


def letter_tuples(which: str, num_views: int) -> Tensor:
    """[T, views] label numbers: every ordered pair, or a fixed draw of so many tuples of different letters."""
    if which == "all":
        if num_views != 2:
            raise ValueError(f"--tuples all: for two views, got {num_views}: give a number of tuples")
        n = len(LETTERS)
        return torch.cartesian_prod(torch.arange(n), torch.arange(n))
    if num_views == 2:
        return letter_pairs(int(which)).T
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(len(LETTERS), generator=generator)[:num_views] for _ in range(int(which))])


def make_pictures(name: str, model: str, views: list[View], wanted: Tensor, args: argparse.Namespace, progress: Progress) -> Sampler:
    """Samples the pictures of a method that DIR/NAME lacks, a file for each batch. Picture i has seed i."""
    folder, _, blend = model.partition("@")
    sampler = Sampler.open(folder, args.device)
    sampler.check([""] * len(views), views)
    out = args.out / name
    out.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(wanted), args.batch_size)
    task = progress.add_task(name, total=len(starts))
    for first in starts:
        path = out / f"{first:06d}.safetensors"
        if not path.exists():
            rows = wanted[first : first + args.batch_size]
            prompts = [[f"the letter {LETTERS[label]}" for label in column] for column in rows.T.tolist()]
            seeds = range(first, first + len(rows))
            options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
            start = time.perf_counter()
            with _autocast(sampler.device):
                pictures = sampler(prompts, views, seeds, blend=blend or "latents", **options)
            seconds = time.perf_counter() - start
            pixels = pictures.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
            tensors = {"pictures": pixels, "wanted": rows.contiguous(), "seconds": torch.tensor(seconds)}
            save_file(tensors, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        progress.advance(task)
    return sampler


def _autocast(device: torch.device):
    """bfloat16 where a CPU computes it natively: the same for all methods."""
    native = device.type == "cpu" and native_precision("cpu") == "bf16-mixed"
    return torch.autocast("cpu", torch.bfloat16) if native else nullcontext()


def load_pictures(folder: Path, wanted: Tensor, batch_size: int) -> tuple[Tensor, float]:
    """Pictures [N, 3, H, W] in [-1, 1], and the median seconds a picture. Raises ValueError where they are of other letters."""
    parts = [load_file(folder / f"{first:06d}.safetensors") for first in range(0, len(wanted), batch_size)]
    if not torch.equal(torch.cat([part["wanted"] for part in parts]), wanted):
        raise ValueError(f"'{folder}' holds pictures of other letters, views or batches: give another --out")
    seconds = torch.stack([part["seconds"] / len(part["wanted"]) for part in parts]).median()
    return torch.cat([part["pictures"] for part in parts]).float().div(127.5).sub(1), float(seconds)


class Measured:
    """What is measured of a method's pictures: by picture and view, so that it can be resampled.

    right: [views, N] read right by the judge.  chosen: [N] the chooser's probability of the wanted letter in the worst view.
    features: [views, N, D].  energy: [views, N].  round_trip: [N] dB, or None for pixel models.
    """

    def __init__(self, pictures: Tensor, seconds: float, views: list[View], wanted: Tensor, judge: Judge, chooser: Judge, vae):
        seen = [view(pictures) for view in views]
        self.seconds = seconds
        self.right = torch.stack([judge(x) == labels for x, labels in zip(seen, wanted.T)])
        self.chosen = torch.stack([chooser.probabilities(x).gather(1, k[:, None])[:, 0] for x, k in zip(seen, wanted.T)]).amin(0)
        self.features = torch.stack([judge.features(x) for x in seen])
        self.energy = torch.stack([torch.cat([high_frequency_energy(part) for part in x.split(256)]) for x in seen])
        with _autocast(torch.device("cpu")):
            self.round_trip = None if isinstance(vae, Pixels) else round_trip_psnr(vae, pictures)

    def both(self) -> Tensor:
        """[N] 1 where every view reads right."""
        return self.right.all(0).double()

    def best(self, num_tuples: int) -> Tensor:
        """[T] 1 where the picture that the chooser likes best, of a tuple's seeds, reads right in every view."""
        choice = self.chosen.view(-1, num_tuples).argmax(0)
        return self.both().view(-1, num_tuples)[choice, torch.arange(num_tuples)]


def summarise(method: Measured, real: RealPictures, views: list[View], clusters: Tensor, weights: Tensor) -> dict:
    """Flat metrics, and the resampled values behind them under `_resampled` for comparisons."""
    num_tuples = int(clusters.max()) + 1
    tuple_weights = weights[:, :num_tuples]  # the first num_tuples pictures are one of each tuple
    drawn = {"ambigramability": weighted_mean(method.both(), weights)}
    metrics: dict = {"ambigramability": float(method.both().mean())}
    count = len(clusters) // num_tuples
    if count > 1:
        metrics[f"best_of_{count}"] = float(method.best(num_tuples).mean())
        drawn[f"best_of_{count}"] = weighted_mean(method.best(num_tuples), tuple_weights)
    kids = []
    for i, view in enumerate(views):
        metrics[f"{view.name}/read_right"] = float(method.right[i].double().mean())
        metrics[f"{view.name}/kid"] = float(kid(real.features, method.features[i]))
        metrics[f"{view.name}/fid"] = float(fid(real.features, method.features[i]))
        metrics[f"{view.name}/texture"] = float(method.energy[i].mean()) / real.energy
        kids.append(kid(real.features, method.features[i], weights))
    metrics["kid"] = sum(metrics[f"{view.name}/kid"] for view in views) / len(views)
    metrics["texture"] = sum(metrics[f"{view.name}/texture"] for view in views) / len(views)
    drawn["kid"] = torch.stack(kids).mean(0)
    drawn["texture"] = weighted_mean(method.energy.mean(0), weights) / real.energy
    if method.round_trip is not None:
        metrics["round_trip_psnr"] = float(method.round_trip.mean())
    metrics["seconds_per_picture"] = method.seconds
    metrics |= {f"{name}_95": interval(values) for name, values in drawn.items()}
    return {**metrics, "_resampled": drawn}


def compare(a: dict, b: dict) -> dict:
    """Of two summaries on the same letters and seeds: a's ambigramability minus b's, and a's KID over b's, with intervals."""
    result = {}
    for name in a["_resampled"]:
        x, y = a["_resampled"][name], b["_resampled"][name]
        ratio = name in ("kid", "texture")
        value = a[name] / b[name] if ratio else a[name] - b[name]
        result[f"{name}_{'ratio' if ratio else 'difference'}"] = value
        result[f"{name}_{'ratio' if ratio else 'difference'}_95"] = interval(x / y if ratio else x - y)
    return result


def table(results: dict[str, dict]) -> str:
    """The methods as a Markdown table."""
    names = [name for name in next(iter(results.values())) if not name.endswith("_95")]
    names = list(dict.fromkeys([*names, *(n for r in results.values() for n in r if not n.endswith("_95"))]))
    lines = [["method", *names], ["---"] * (len(names) + 1)]
    for method, metrics in results.items():
        cells = []
        for name in names:
            value, bounds = metrics.get(name), metrics.get(f"{name}_95")
            text = "-" if value is None else f"{value:.3g}"
            cells.append(text + (f" ({bounds[0]:.3g} to {bounds[1]:.3g})" if bounds else ""))
        lines.append([method, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def run(args: argparse.Namespace) -> Path:
    views = [parse_view(name) for name in args.views]
    methods = dict(method.split("=", 1) for method in args.methods if "=" in method)
    if len(methods) != len(args.methods):
        raise ValueError(f"methods: got {' '.join(args.methods)}, wanted NAME=MODEL each, with different names")
    tuples = letter_tuples(args.tuples, len(views))
    wanted = tuples.repeat(args.num_seeds, 1)
    clusters = torch.arange(len(tuples)).repeat(args.num_seeds)
    judge, chooser = Judge.open(args.judge), Judge.open(args.chooser)
    samples = PictureSamples(args.real)
    real = RealPictures.of(torch.stack([samples[i]["x"] for i in range(len(samples))]), judge)
    weights = bootstrap_weights(clusters, args.num_resamples)
    summaries = {}
    with Progress() as progress:
        for name, model in methods.items():
            sampler = make_pictures(name, model, views, wanted, args, progress)
            pictures, seconds = load_pictures(args.out / name, wanted, args.batch_size)
            measured = Measured(pictures, seconds, views, wanted, judge, chooser, sampler.vae)
            summaries[name] = summarise(measured, real, views, clusters, weights)
            if args.tuples == "all":
                rates = measured.both().view(args.num_seeds, len(LETTERS), len(LETTERS)).mean(0)
                letter_matrix(rates, f"{name}: read right in {' and '.join(args.views)}").save(args.out / f"matrix_{name}.png")
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
    parser.add_argument("methods", nargs="+", metavar="NAME=MODEL[@pixels]")
    parser.add_argument("--views", nargs="+", default=["identity", "rotate_180"])
    parser.add_argument("--tuples", default="all", help="all, or a number of tuples of letters")
    parser.add_argument("--num-seeds", type=int, default=4)
    parser.add_argument("--real", type=Path, required=True, help="picture shards that samples are held against, all of them")
    parser.add_argument("--judge", help="judge folder (default: the shipped one)")
    parser.add_argument("--chooser", required=True, help="another judge's folder, which chooses the best of a tuple's pictures")
    parser.add_argument("--against", help="the method that all others are compared with")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=52)
    parser.add_argument("--num-resamples", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.against is not None and args.against not in [method.split("=")[0] for method in args.methods]:
        parser.error(f"--against {args.against} is none of the methods")
    return args


def main() -> None:
    try:
        print(run(parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
