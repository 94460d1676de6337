"""Which of two models is better, and which differences are real?

    python -m eqldm.evaluation.compare DIR/NAME DIR/NAME [...] [--out FILE]

Each is a folder that `python -m eqldm.evaluate` wrote for a model; all others are held against the first. Where both were measured on the
same pictures, prompts and seeds, their resamples are paired.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from eqldm.command import Parser, error_line
from eqldm.evaluation.bootstrap import CONFIDENCE, Interval
from eqldm.evaluation.naming import direction, number, question_of, stands_apart
from eqldm.evaluation.quantiles import t_quantile, t_tail
from eqldm.markdown import markdown
from eqldm.paths import path_option, place_option
from eqldm.weights import read_json, read_weights

LEVEL = 0.05  # of being wrong about any difference that is called real
FEWEST = 6
"""Clusters for that. Of fewer, all differ the same way with a chance above 5 %, so that a star would rest on the t distribution alone."""
FILES = ("metrics.json", "intervals.json", "resampled.safetensors", "about.json")


@dataclass(frozen=True)
class Measured:
    """A model's results, as `evaluate` keeps them; see `results`."""

    name: str
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    resampled: dict[str, Tensor]
    about: dict

    @property
    def samples(self) -> dict[str, dict]:
        """By question, what its pictures were."""
        return self.about["samples"]

    @classmethod
    def open(cls, folder: str | Path) -> Measured:
        """Those of a folder. Raises FileNotFoundError where it holds none, ValueError where they are damaged or not of one run."""
        folder = Path(folder)
        missing = [name for name in FILES if not (folder / name).is_file()]
        how = "run python -m eqldm.evaluate again, which takes what is measured from its --out"
        if [name for name in missing if name != "intervals.json"]:
            raise FileNotFoundError(
                f"'{folder}' holds no results (it lacks {', '.join(missing)}): give DIR/NAME of python -m eqldm.evaluate --out DIR"
            )
        resampled = read_weights(folder / "resampled.safetensors")
        if missing:
            raise FileNotFoundError(
                f"'{folder}' lacks intervals.json, as results of earlier versions do: how many clusters of alike pictures they count, "
                "and so which differences are real, is not known: run python -m eqldm.evaluate again"
            )
        metrics, kept, about = (read_json(folder / name) for name in ("metrics.json", "intervals.json", "about.json"))
        if odd := [name for name, value in metrics.items() if type(value) not in (int, float)]:
            raise ValueError(f"'{folder / 'metrics.json'}': {odd[0]} is {metrics[odd[0]]!r}, wanted a number: {how}")
        if odd := [name for name in resampled if name not in metrics]:
            raise ValueError(f"'{folder}': resampled.safetensors knows {odd[0]}, metrics.json does not, so they are of two runs: {how}")
        if odd := [name for name, each in resampled.items() if each.dim() != 1 or len(each) < 2 or not bool(each.isfinite().all())]:
            raise ValueError(f"'{folder / 'resampled.safetensors'}': {odd[0]} is no list of finite numbers, it is damaged: {how}")
        if odd := [name for name in resampled if not math.isfinite(metrics[name])]:
            raise ValueError(f"'{folder / 'metrics.json'}': {odd[0]} is {metrics[odd[0]]}, though its resamples are finite: {how}")
        if odd := sorted(kept.keys() ^ resampled.keys()):
            raise ValueError(f"'{folder}': intervals.json and resampled.safetensors differ in {odd[0]}, so they are of two runs: {how}")
        intervals = {name: _interval(each) for name, each in kept.items()}
        if odd := [name for name, each in intervals.items() if each is None or not each.low <= metrics[name] <= each.high]:
            wanted = f"wanted low <= {metrics[odd[0]]} <= high and num_clusters > 1"
            raise ValueError(f"'{folder / 'intervals.json'}': {odd[0]} is {kept[odd[0]]!r}, {wanted}: {how}")
        samples = about.get("samples")
        if not isinstance(samples, dict) or not all(isinstance(each, dict) for each in samples.values()):
            raise ValueError(f"'{folder / 'about.json'}' does not say what was sampled (samples), so nothing can be paired: {how}")
        if odd := [name for name in intervals if question_of(name) not in samples]:
            raise ValueError(f"'{folder / 'about.json'}' does not say what was sampled for {odd[0]}, so it cannot be paired: {how}")
        return cls(folder.name, metrics, {name: each for name, each in intervals.items() if each}, resampled, about)


def _interval(kept) -> Interval | None:
    """Of what `intervals.json` holds; None where it is none."""
    if not isinstance(kept, dict) or kept.keys() != {"low", "high", "num_clusters"}:
        return None
    if any(type(value) not in (int, float) or not math.isfinite(value) for value in kept.values()):
        return None
    return Interval(**kept) if type(kept["num_clusters"]) is int and kept["num_clusters"] > 1 else None


@dataclass(frozen=True)
class Difference:
    """a - b of a metric. bounds: 95 %.  paired: on the same pictures.  p: of a difference as large where there is none.

    real: whether it is, by Holm's procedure over all metrics of a comparison: the chance of calling any wrongly so is `LEVEL`.
    """

    value: float
    bounds: tuple[float, float]
    paired: bool
    p: float
    real: bool = False


def differences(a: Measured, b: Measured) -> dict[str, Difference]:
    """Of all metrics that both have, with an interval. Those of populations that stand apart are given, but never called real: they would
    make the comparison of the others stricter.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    found = {}
    for name in a.intervals:
        if name not in b.intervals:
            continue
        mine, theirs, question = a.resampled[name], b.resampled[name], question_of(name)
        paired = a.samples[question] == b.samples[question] and len(mine) == len(theirs)
        together = correlation(mine, theirs) if paired else 0.0
        found[name] = _difference(a.metrics[name], a.intervals[name], b.metrics[name], b.intervals[name], together, paired)
    family = [name for name in found if not stands_apart(name)]
    real, ordered = True, sorted(family, key=lambda name: found[name].p)
    for rank, name in enumerate(ordered):
        real = real and found[name].p < LEVEL / (len(ordered) - rank)
        found[name] = replace(found[name], real=real)
    return found


def _difference(a: float, of_a: Interval, b: float, of_b: Interval, together: float, paired: bool) -> Difference:
    """Of two values with their intervals, whose errors have the correlation `together`.

    Each bound is as far from the difference as the two values' bounds on that side make it; where intervals are symmetric, that is the t
    interval of the difference. Degrees of freedom are one less than the clusters of that one that has fewer. p is by the bound on the side
    of 0, so that it is below 5 % where the interval leaves 0 out.

    Source: Newcombe 1998, Statistics in Medicine 17, for rates; Zou & Donner 2008, Statistics in Medicine 27, for any.
    """
    clusters, value = min(of_a.num_clusters, of_b.num_clusters), a - b
    (a_below, a_above), (b_below, b_above) = _spreads(a, of_a), _spreads(b, of_b)
    below, above = (
        math.sqrt((mine - other) ** 2 + 2 * (1 - together) * mine * other) for mine, other in ((a_below, b_above), (a_above, b_below))
    )
    rounding = torch.finfo(torch.float32).eps * max(abs(a), abs(b))
    below, above = (each if each > rounding else 0.0 for each in (below, above))
    t, spread = t_quantile(CONFIDENCE, clusters - 1), below if value > 0 else above
    p = 1.0
    if clusters >= FEWEST and abs(value) > rounding:  # without a spread: all clusters differ alike, by chance as rarely as coins fall alike
        p = t_tail(abs(value) / spread, clusters - 1) if spread > 0 else 2.0 ** (1 - clusters)
    return Difference(value, (value - t * below, value + t * above), paired, p)


def _spreads(value: float, interval: Interval) -> tuple[float, float]:
    """The standard error that each side of an interval stands for: below the value, and above."""
    t = t_quantile(CONFIDENCE, interval.num_clusters - 1)
    return (value - interval.low) / t, (interval.high - value) / t


def correlation(x: Tensor, y: Tensor) -> float:
    """Of values [R] and [R], in [-1, 1]; exactly 1 where they are equal, 0 where either is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    if not (float(x.norm()) > 0 and float(y.norm()) > 0):
        return 0.0
    return 1 - float((x / x.norm() - y / y.norm()).square().sum()) / 2


def difference_cell(each: Difference | None) -> str:
    """As reports write it: the difference, its interval, and a star where it is real."""
    if each is None:
        return "-"
    low, high = (f"{bound:+.3g}" for bound in each.bounds)
    return f"{each.value:+.3g} ({low} to {high}){' *' if each.real else ''}{'' if each.paired else ' (other pictures)'}"


def comparison_headings(models: Sequence[Measured]) -> list[str]:
    """Of the columns of `comparison_rows`."""
    names = [model.name for model in models]
    return ["metric", *names, *(f"{name} minus {names[0]}" for name in names[1:])]


def comparison_rows(
    models: Sequence[Measured], names: Sequence[str], against: Sequence[dict[str, Difference]], cell: Callable[[Measured, str], str]
) -> list[list[str]]:
    """One row for each of these metrics, with the way to better: each model's cell, and what all but the first have more than that."""
    return [
        [
            f"{name} {direction(name)}".strip(),
            *(cell(model, name) for model in models),
            *(difference_cell(found.get(name)) for found in against),
        ]
        for name in names
    ]


def comparison_table(models: Sequence[Measured]) -> str:
    """All metrics, but those of a single bin, as a Markdown table."""
    first, *others = models
    names = [name for name in dict.fromkeys(name for model in models for name in model.metrics) if "/bin_" not in name]
    against = [differences(other, first) for other in others]
    rows = comparison_rows(models, names, against, lambda model, name: number(model.metrics.get(name)))
    return markdown(comparison_headings(models), rows)


NOTE = (
    "In brackets the 95 % interval of this figure alone, from the spread between clusters of alike pictures (Clopper-Pearson for rates, "
    "Student's t for others). A star: the difference is real; the chance of one wrong star in a column is at most 5 % (Holm: stricter than "
    f"the interval; none below {FEWEST} clusters). "
    "Pictures differ where they are said to; else both models were measured on the same ones, or with the same prompts and seeds."
)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("results", nargs="+", type=place_option, metavar="DIR/NAME", help="results; all others are held against the first")
    parser.add_argument("--out", type=path_option, help="Markdown file to write")
    args = parser.parse_args()
    try:
        if len(args.results) < 2:
            raise ValueError(f"wanted two results or more, got {len(args.results)}")
        found = [Measured.open(folder) for folder in args.results]
        if len({model.name for model in found}) < len(found):  # of several reports
            found = [replace(model, name=folder) for model, folder in zip(found, args.results)]
        text = comparison_table(found) + f"\n{NOTE}\n"
        if args.out:
            args.out.write_text(text)
        print(text)
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))


if __name__ == "__main__":
    main()
