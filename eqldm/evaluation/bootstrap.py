"""Intervals of metrics, and resamples that tell how the metrics of two models vary together.

Pictures of the same prompts (a *cluster*) are alike, whatever their seeds. So clusters are counted, not pictures: spreads are those between
clusters, with the factor G / (G - 1) on the variance of G clusters, and quantiles are those of Student's t with G - 1 degrees of freedom.
Clusters should be of about equal sizes, as those of the evaluation are, one or two prompts each. Where a few hold most of the pictures (5
of 16 beside 20 of one), and all that is read of a cluster is alike, a rate's interval holds it in as few as 71 % of draws.
Source: Cameron, Gelbach & Miller 2008, Review of Economics and Statistics 90, section II, on few clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eqldm.evaluation.quantiles import beta_quantile, t_quantile

CONFIDENCE = 0.95  # of all intervals


@dataclass(frozen=True)
class Interval:
    """low, high: bounds of a metric, at `CONFIDENCE`.  num_clusters: more than one, that it is estimated from."""

    low: float
    high: float
    num_clusters: int


def bootstrap_weights(clusters: Tensor, num_resamples: int = 2000, seed: int = 0) -> Tensor:
    """[R, N] float64 counts of N pictures in R resamples of their clusters, drawn with replacement.

    clusters: [N] cluster number of each picture. Equal arguments give equal counts: the pairing of comparisons.
    """
    clusters = torch.unique(clusters, return_inverse=True)[1]  # a cluster without a picture is none
    count = int(clusters.max()) + 1
    drawn = torch.randint(count, (num_resamples, count), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones_like(drawn, dtype=torch.float64)
    counts = torch.zeros_like(ones).scatter_add_(1, drawn, ones)
    return counts[:, clusters]


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """[R] means of values [N] in each resample [R, N]."""
    return weights @ values.double() / weights.sum(1)


def errors_between(values: Tensor, of: Tensor, clusters: Tensor) -> Tensor:
    """[G] what each cluster adds to the error of the sum of values [N] over the sum of others [N], linearised; they sum to 0.

    clusters: [N] cluster numbers; those all of whose `of` are 0 do not count.
    """
    values, of, clusters = values[of != 0].double(), of[of != 0].double(), clusters[of != 0].unique(return_inverse=True)[1]
    errors = (values - of * (values.sum() / of.sum())) / of.sum()
    return errors.new_zeros(int(clusters.max()) + 1).index_add_(0, clusters, errors)


def spread_between(errors: Tensor) -> float:
    """Standard error of what has these errors [G] of G > 1 clusters, with the factor G / (G - 1) on its square."""
    return math.sqrt(len(errors) / (len(errors) - 1) * float(errors.square().sum()))


def t_interval(value: float, spread: float, num_clusters: int) -> Interval:
    """That of a value with this standard error."""
    half = spread * t_quantile(CONFIDENCE, num_clusters - 1)
    return Interval(value - half, value + half, num_clusters)


def rate_interval(hits: Tensor, of: Tensor, clusters: Tensor) -> Interval:
    """That of the share of hits [N] among the pictures that count, of [N], both 0 or 1; clusters: [N], two or more.

    It is Clopper & Pearson's for as many independent pictures as these are worth: see `worth`.

    Source: Clopper & Pearson 1934, Biometrika 26. Wilson's interval (1927, JASA 22) is shorter, but it holds a rate of .005 in 85 % of
    draws of 32 pictures; this one in 95 % or more.
    """
    errors, rate = errors_between(hits, of, clusters), float(hits.double().sum() / of.double().sum())
    independent, tail = worth(hits, of, clusters), (1 - CONFIDENCE) / 2
    found = rate * independent
    low = beta_quantile(tail, found, independent - found + 1) if rate > 0 else 0.0
    high = beta_quantile(1 - tail, found + 1, independent - found) if rate < 1 else 1.0
    return Interval(low, high, len(errors))


def worth(hits: Tensor, of: Tensor, clusters: Tensor) -> float:
    """How many independent pictures say as much of their share of hits: the number of pictures over their design effect.

    The design effect is the variance between clusters over that of as many independent pictures. Where few clusters hold the hits, it is
    known badly, and rather too low than too high. This is allowed for by (t_{n - 1} / t_h)^2, as by Korn & Graubard, who have G - 1 for h;
    here h is the number of clusters that make up the variance, (sum of e^2)^2 / sum of e^4 of their errors e, which is small where hits
    are few. The result is at most the number of pictures, and at least that of clusters (if unequal, of equal ones that say as much). It
    is the latter where all pictures are hits, or none is, which tells nothing of how alike those of a cluster are.

    Source: Kish 1965, Survey Sampling, sections 5.4 and 8.2; Korn & Graubard 1998, Survey Methodology 24.
    """
    pictures, rate = float(of.double().sum()), float(hits.double().sum() / of.double().sum())
    sizes = torch.zeros(int(clusters.max()) + 1, dtype=torch.float64).index_add_(0, clusters, of.double())
    least = pictures**2 / float(sizes.square().sum())
    if not 0 < rate < 1:
        return least
    errors = errors_between(hits, of, clusters)
    squares = errors.square()
    if float(squares.sum()) == 0:  # as many hits in each
        return pictures
    behind = min(max(float(squares.sum() ** 2 / squares.square().sum()), 1.0), len(errors) - 1)
    known = t_quantile(CONFIDENCE, pictures - 1) / t_quantile(CONFIDENCE, round(behind, 1))
    return min(max(rate * (1 - rate) / spread_between(errors) ** 2 * known**2, least), pictures)


class Findings:
    """Metrics, the interval of each, and what each becomes in every resample of its pictures.

    metrics: by name.  intervals: by name, of those that have one: from two clusters on.  resampled: [R] by name, of the same; those of two
    models are paired where both were measured on the same pictures (of the same clusters).
    """

    def __init__(self, clusters: Tensor, num_resamples: int = 1000):
        """clusters: [N] cluster number of each picture."""
        self.clusters = torch.unique(clusters, return_inverse=True)[1]  # a cluster without a picture is none
        self.num_clusters = int(self.clusters.max()) + 1
        self.weights = bootstrap_weights(self.clusters, num_resamples)
        self.metrics: dict[str, float] = {}
        self.intervals: dict[str, Interval] = {}
        self.resampled: dict[str, Tensor] = {}

    def take(self, others: Findings) -> None:
        """Adds what was found of other pictures, such as a part of these."""
        self.metrics |= others.metrics
        self.intervals |= others.intervals
        self.resampled |= others.resampled

    def mean(self, name: str, values: Tensor, rate: bool | None = None) -> None:
        """The mean of values [N], one of each picture. rate: whether each is a hit (1) or none (0); by default where all are 0 or 1."""
        self.ratio(name, values, torch.ones_like(values), rate)

    def ratio(self, name: str, values: Tensor, of: Tensor, rate: bool | None = None) -> None:
        """The sum of values [N] over the sum of others [N]. rate: whether it is the share of hits among the pictures of which `of` is 1; by
        default where all are 0 or 1. Raises ValueError where it is said to be and is not."""
        zero_or_one = bool(((of == 0) | (of == 1)).all() and ((values == 0) | (values == of)).all())
        if rate and not zero_or_one:
            raise ValueError(f"{name} is said to be a rate, but its values are not all 0 or 1")
        self._ratio(name, values, of, zero_or_one if rate is None else rate)

    def share(self, name: str, values: Tensor, of: Tensor) -> None:
        """The sum of values [N], from 0 to 1 (how many of several judges see a hit), over the number of pictures of which `of` [N] is 1.

        Its interval is that of a rate: values between 0 and 1 vary less than hits do, so it is wide enough. Student's t holds a share of
        .02 of 64 pictures by five judges that disagree in 83 % of draws.
        """
        self._ratio(name, values, of, True)

    def _ratio(self, name: str, values: Tensor, of: Tensor, rate: bool) -> None:
        self.metrics[name] = value = float(values.double().sum() / of.double().sum())
        if not math.isfinite(value) or len(errors := errors_between(values, of, self.clusters)) < 2:
            return
        if rate:
            interval = rate_interval(values, of, self.clusters)
        else:
            interval = t_interval(value, spread_between(errors), len(errors))
        self._keep(name, (self.weights @ values.double()) / (self.weights @ of.double()), interval)

    def of_weights(self, name: str, estimate: Callable[[Tensor], Tensor]) -> None:
        """A metric that is no mean: `estimate` gives it [W] for weights [W, N] of the pictures. Its spread is that of the resamples."""
        values = estimate(torch.cat([torch.ones_like(self.weights[:1]), self.weights]))
        self.metrics[name] = value = float(values[0])
        if self.num_clusters > 1 and math.isfinite(value):
            spread = float(values[1:].std()) * math.sqrt(self.num_clusters / (self.num_clusters - 1))
            self._keep(name, values[1:], t_interval(value, spread, self.num_clusters))

    def _keep(self, name: str, resampled: Tensor, interval: Interval) -> None:
        if bool(resampled.isfinite().all()):  # else there are too few pictures for an interval
            self.intervals[name] = interval
            self.resampled[name] = resampled
