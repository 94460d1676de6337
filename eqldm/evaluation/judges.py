"""Several judges of the same pictures: the mean of what they read right, how far they lie apart, and how far they agree.

Judges err, each in its own way: a claim that rests on letters that one of them reads should hold for others, of other seeds, architectures
and training pictures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.entries import folder_names
from eqldm.evaluation.judge import SHIPPED, Judge
from eqldm.evaluation.naming import OF_JUDGES
from eqldm.paths import expanded

SUMMARIES = ("least", "most", "kappa")  # which no judge may be called


def open_judges(texts: Sequence[str] | None) -> dict[str, Judge]:
    """Those of `[NAME=]FOLDER`, by name, in order; without a name that of the folder, or of the run that it is in. None: the shipped one.

    Raises ValueError where names or judges are given twice; FileNotFoundError, ValueError as `Judge.open`.
    """
    given = [("", text) if Path(text).exists() or "=" not in text else tuple(text.split("=", 1)) for text in texts or [str(SHIPPED)]]
    if odd := [f"{name}={folder}" for name, folder in given if not folder or not re.fullmatch(r"([^\W_][\w.+-]*)?", name)]:
        raise ValueError(f"--judge: got '{odd[0]}', wanted FOLDER or NAME=FOLDER, a name of letters, digits and . + - _")
    folders = [Path(expanded(folder)) for _, folder in given]
    unnamed = iter(folder_names([folder for (name, _), folder in zip(given, folders) if not name]))
    names = [name or next(unnamed) for name, _ in given]
    if twice := sorted({name for name in names if names.count(name) > 1 or name in SUMMARIES}):
        raise ValueError(f"--judge: '{twice[0]}' is the name of two judges, or of their summary: name them, NAME=FOLDER")
    judges = {name: Judge.open(folder) for name, folder in zip(names, folders)}
    for one, other in combinations(judges, 2):
        if judges[one].hash == judges[other].hash:
            raise ValueError(f"--judge: '{one}' and '{other}' are one judge (their weights are the same): give each once")
    return judges


def by_judge(values: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """What each judge read (`read`), or read where it must name a letter (`forced`), of measured values, by its name; of one alone without
    a name."""
    named = {name.removeprefix(f"{what}/"): value for name, value in values.items() if name.startswith(f"{what}/")}
    return named or {"": values[what]}


def by_suffix(judge: Judge | None, judges: Mapping[str, Judge]) -> dict[str, Judge]:
    """Those that read, by what ends the names of their values (`read/NAME`; see `by_judge`): `/NAME` of several, nothing of one alone.

    judge: the one, or the first of several.  judges: by name, where there are several.
    """
    return {f"/{name}": each for name, each in judges.items()} or ({"": judge} if judge is not None else {})


def add_share(findings: Findings, prefix: str, name: str, right: Mapping[str, Tensor], of: Tensor | None = None) -> None:
    """Adds the mean over judges of the share of pictures that they read right; and, where there are several, each one's, the least and
    the most (see `add_each`).

    right: by judge, [N] 1 where right, else 0.  of: [N] 1 of the pictures that count, else 0; None: all. Intervals draw pictures, not
    judges.
    """
    of = torch.ones_like(next(iter(right.values()))) if of is None else of
    findings.share(prefix + name, torch.stack([each * of for each in right.values()]).mean(0), of)
    if len(right) > 1:
        own = {judge: f"{prefix}{OF_JUDGES}/{judge}/{name}" for judge in right}
        for judge, each in right.items():
            findings.share(own[judge], each * of, of)
        add_each(findings.metrics, prefix, name, {judge: findings.metrics[own[judge]] for judge in right})


def add_each(metrics: dict[str, float], prefix: str, name: str, values: Mapping[str, float]) -> None:
    """Adds a metric of each of several judges, `judges/JUDGE/NAME`, and the least and the most of them, `judges/least/NAME` and
    `judges/most/NAME`; nothing of one alone."""
    if len(values) > 1:
        known = dict(values) | {"least": min(values.values()), "most": max(values.values())}
        metrics |= {f"{prefix}{OF_JUDGES}/{judge}/{name}": value for judge, value in known.items()}


def add_agreement(findings: Findings, prefix: str, right: Mapping[str, Tensor]) -> None:
    """Adds `judges/kappa`, the mean over pairs of judges of Cohen's kappa of whether a picture reads right; the least and the most of the
    pairs, `judges/kappa_least` and `judges/kappa_most`; and `judges/kappa_pairs`, how many pairs these are. Of one judge alone it adds
    nothing. right: by judge, [N] 0 or 1.

    A pair of which chance alone explains all agreement (neither reads anything right, or both everything) has no kappa and is left out.
    """
    if len(right) < 2:
        return
    pairs = list(combinations(right.values(), 2))
    findings.of_weights(f"{prefix}{OF_JUDGES}/kappa", lambda w: torch.stack([kappa(a, b, w) for a, b in pairs]).nanmean(0))
    found = [float(kappa(a, b)) for a, b in pairs]
    known = [value for value in found if value == value]
    ends = {"least": min(known, default=math.nan), "most": max(known, default=math.nan), "pairs": len(known)}
    findings.metrics |= {f"{prefix}{OF_JUDGES}/kappa_{name}": value for name, value in ends.items()}


def kappa(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """[] Cohen's kappa of two judgements [N], numbers of any answers: agreement beyond chance, over what there could be; NaN where chance
    alone makes them agree always.

    weights: [R, N] counts of a bootstrap; the result is then [R]. Source: Cohen 1960, Educational and Psychological Measurement 20.
    """
    w = torch.ones(1, len(a), dtype=torch.float64) if weights is None else weights.double()
    total, agreed = w.sum(1), w @ (a == b).double()
    chance = torch.stack([(w @ (a == answer).double()) * (w @ (b == answer).double()) for answer in torch.cat([a, b]).unique()]).sum(0)
    most = total.square()  # in squared pictures, as chance: counts stay whole numbers, and no agreement beyond chance is exactly 0
    found = torch.where(chance < (1 - 1e-12) * most, (agreed * total - chance) / (most - chance), torch.nan)
    return found[0] if weights is None else found


def of_one_judge(name: str) -> bool:
    """Whether a metric is that of a single judge, or the least or the most of several, and not of all."""
    return f"/{OF_JUDGES}/" in name and not name.endswith(f"/{OF_JUDGES}/kappa")


def judges_range(metrics: Mapping[str, float], name: str) -> tuple[float, float] | None:
    """The least and the most that judges give of a metric of all of them; None where there is one alone, or none."""
    head, _, last = name.rpartition("/")
    keys = [f"{name}_{end}" if last == "kappa" else f"{head}/{OF_JUDGES}/{end}/{last}" for end in ("least", "most")]
    return (metrics[keys[0]], metrics[keys[1]]) if all(key in metrics for key in keys) else None
