"""Is a difference that was seen with some trainings, prompts and judges one that others would see too?

All three are samples: another training seed gives another model, other pairs of letters are harder, another judge reads otherwise. Here
each is a source of spread, so that the interval of a difference holds for new ones of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

from eqldm.evaluation.bootstrap import errors_between, spread_between
from eqldm.evaluation.quantiles import t_quantile, t_tail


@dataclass(frozen=True)
class Contrast:
    """A mean difference.  bounds: 95 %.  p: of one as large where there is none; NaN where all differences are the same, but not 0, so that
    nothing is known of their spread.  shares: by source, its share of the squared error."""

    value: float
    bounds: tuple[float, float]
    p: float
    shares: dict[str, float]


def contrast(differences: Tensor, sources: Sequence[str], alike: Mapping[str, Tensor] | None = None) -> Contrast:
    """Of differences [S, P, ...] between two methods, in each combination of levels of the crossed random factors `sources`.

    alike: by source, [levels] cluster numbers of levels that are no independent draws, such as a pair of letters in either order; clusters
    are counted then (see `bootstrap`).

    The squared error is the sum over the factors of the variance of their levels' means, divided by their number: each term holds its
    share of the interactions and of the residual too, which are so counted once a factor, and the interval is on the safe side. Degrees of
    freedom are Satterthwaite's, of Student's t. In simulations p is below 5 % without a difference in 0 to 6 % of draws, but in 10 % where
    a factor of two levels makes up nearly all of the error. Raises ValueError where a factor has one level, or cluster: it says nothing of
    others.
    Source: Clark, The language-as-fixed-effect fallacy, 1973 (two crossed random factors); Satterthwaite 1946.
    """
    if differences.dim() != len(sources):
        raise ValueError(
            f"differences of shape {tuple(differences.shape)} for the sources {', '.join(sources)}: wanted a dimension for each"
        )
    of = [(alike or {}).get(name, torch.arange(count)) for name, count in zip(sources, differences.shape)]
    if few := [name for name, clusters in zip(sources, of) if len(clusters.unique()) < 2]:
        raise ValueError(f"{few[0]}: got one level, wanted two or more: with one, nothing is known of others")
    values, terms, freedom = differences.double(), [], []
    for k, clusters in enumerate(of):
        means = values.movedim(k, 0).flatten(1).mean(1)
        errors = errors_between(means, torch.ones_like(means), clusters)
        terms.append(spread_between(errors) ** 2)
        freedom.append(len(errors) - 1)
    value, squared = float(values.mean()), sum(terms)
    if squared == 0:
        return Contrast(value, (value, value), 1.0 if value == 0 else math.nan, dict.fromkeys(sources, 0.0))
    df = squared**2 / sum(term**2 / free for term, free in zip(terms, freedom))
    reach = t_quantile(0.95, df) * math.sqrt(squared)
    p = t_tail(value / math.sqrt(squared), df)
    return Contrast(value, (value - reach, value + reach), p, {name: term / squared for name, term in zip(sources, terms)})


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """The exact two-sided p of a difference of means between trainings a and b, of all ways to deal the same figures to the two.

    With three and three the least is 2 / 20 = .1: all of one above all of the other.
    """
    pooled, observed = [*a, *b], abs(sum(a) / len(a) - sum(b) / len(b))
    found = []
    for chosen in itertools.combinations(range(len(pooled)), len(a)):
        mine = [pooled[k] for k in chosen]
        theirs = [value for k, value in enumerate(pooled) if k not in chosen]
        found.append(abs(sum(mine) / len(mine) - sum(theirs) / len(theirs)) >= observed - 1e-12)
    return sum(found) / len(found)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(Spearman's rho, its p by all or 20,000 seeded permutations): whether more of one goes with more of the other.

    x, y: a value of each of two or more independent things; equal values share their mean rank. Where x or y is constant, rho is NaN and
    p is 1.
    """
    ranks = [torch.from_numpy(rankdata(values)) for values in (x, y)]
    if any(bool((each == each[0]).all()) for each in ranks):
        return math.nan, 1.0
    centred = [(each - each.mean()) / each.std() for each in ranks]
    n = len(x)
    rho = float((centred[0] * centred[1]).sum() / (n - 1))
    orders: list[Sequence[int]] = list(itertools.permutations(range(n))) if n <= 7 else []
    if not orders:
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(n, generator=generator).tolist() for _ in range(20000)]
    shuffled = centred[1][torch.tensor(orders)] @ centred[0] / (n - 1)
    hits = int((shuffled.abs() >= abs(rho) - 1e-12).sum())
    return rho, hits / len(orders) if n <= 7 else (hits + 1) / (len(orders) + 1)
