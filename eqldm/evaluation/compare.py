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

from torch import Tensor

from eqldm.command import Parser, error_line
from eqldm.evaluation.bootstrap import interval
from eqldm.evaluation.naming import direction, number, question_of
from eqldm.markdown import markdown
from eqldm.paths import path_option, place_option
from eqldm.weights import read_json, read_weights

LEVEL = 0.05  # of being wrong about any difference that is called real
FEWEST = 30  # pictures for that: p is by the normal distribution, with the spread that the bootstrap gives


@dataclass(frozen=True)
class Measured:
    """A model's results, as `evaluate` keeps them; see `results`."""

    name: str
    metrics: dict[str, float]
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
        missing = [name for name in ("metrics.json", "resampled.safetensors", "about.json") if not (folder / name).is_file()]
        if missing:
            how = "give DIR/NAME of python -m eqldm.evaluate --out DIR"
            raise FileNotFoundError(f"'{folder}' holds no results (it lacks {', '.join(missing)}): {how}")
        metrics, about = (read_json(folder / name) for name in ("metrics.json", "about.json"))
        resampled = read_weights(folder / "resampled.safetensors")
        how = "run python -m eqldm.evaluate again, which takes what is measured from its --out"
        if odd := [name for name, value in metrics.items() if type(value) not in (int, float)]:
            raise ValueError(f"'{folder / 'metrics.json'}': {odd[0]} is {metrics[odd[0]]!r}, wanted a number: {how}")
        if odd := [name for name in resampled if name not in metrics]:
            raise ValueError(f"'{folder}': resampled.safetensors knows {odd[0]}, metrics.json does not, so they are of two runs: {how}")
        if odd := [name for name, each in resampled.items() if each.dim() != 1 or len(each) < 2 or not bool(each.isfinite().all())]:
            raise ValueError(f"'{folder / 'resampled.safetensors'}': {odd[0]} is no list of finite numbers, it is damaged: {how}")
        if odd := [name for name in resampled if not math.isfinite(metrics[name])]:
            raise ValueError(f"'{folder / 'metrics.json'}': {odd[0]} is {metrics[odd[0]]}, though its resamples are finite: {how}")
        samples = about.get("samples")
        if not isinstance(samples, dict) or not all(isinstance(each, dict) for each in samples.values()):
            raise ValueError(f"'{folder / 'about.json'}' does not say what was sampled (samples), so nothing can be paired: {how}")
        return cls(folder.name, metrics, resampled, about)


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
    """Of all metrics that both have, with an interval.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    found = {}
    for name in a.resampled:
        if name not in b.resampled:
            continue
        question = question_of(name)
        paired = a.samples.get(question) == b.samples.get(question) and len(a.resampled[name]) == len(b.resampled[name])
        count = min(len(a.resampled[name]), len(b.resampled[name]))
        mine, theirs = a.resampled[name][:count].double(), b.resampled[name][:count].double()
        drawn = mine - (theirs if paired else theirs.roll(1))  # the same draws of other pictures are not one draw
        value, spread = a.metrics[name] - b.metrics[name], float(drawn.std())
        p = math.erfc(abs(value) / spread / math.sqrt(2)) if spread > 0 else 1.0  # a spread of 0 is that of too few pictures
        fewest = min(model.samples.get(question, {}).get("count", FEWEST) for model in (a, b))
        found[name] = Difference(value, interval(drawn), paired, p if fewest >= FEWEST else 1.0)
    real, ordered = True, sorted(found, key=lambda name: found[name].p)
    for rank, name in enumerate(ordered):
        real = real and found[name].p < LEVEL / (len(ordered) - rank)
        each = found[name]
        found[name] = Difference(each.value, each.bounds, each.paired, each.p, real)
    return found


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
    "In brackets the 95 % interval of this figure alone (bootstrap). A star: the difference is real; the chance of one wrong star in a "
    "column is 5 % (Holm: stricter than the interval; none below 30 pictures). "
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
