"""Intervals by resampling. Methods are compared on the same pairs of letters and seeds, so their differences are resampled as one.

Pictures of one pair of letters are alike, whatever their seeds: what is drawn anew is pairs, each with all its pictures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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


def interval(resampled: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The central interval of resampled values [R] (percentile bootstrap)."""
    tail = (1 - level) / 2
    low, high = torch.quantile(resampled.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


class Findings:
    """Metrics, and what each becomes in every resample of its pictures.

    metrics: by name.  resampled: [R] by name, where the metric has an interval; those of two models are paired where both were
    measured on the same pictures (of the same clusters).
    """

    def __init__(self, clusters: Tensor, num_resamples: int = 1000):
        self.weights = bootstrap_weights(clusters, num_resamples)
        self.metrics: dict[str, float] = {}
        self.resampled: dict[str, Tensor] = {}

    def mean(self, name: str, values: Tensor) -> None:
        """The mean of values [N], one of each picture."""
        self.ratio(name, values, torch.ones_like(values))

    def ratio(self, name: str, values: Tensor, of: Tensor) -> None:
        """The sum of values [N] over the sum of others [N]."""
        self.metrics[name] = float(values.double().sum() / of.double().sum())
        self._keep(name, (self.weights @ values.double()) / (self.weights @ of.double()))

    def of_weights(self, name: str, estimate: Callable[[Tensor], Tensor]) -> None:
        """A metric that is no mean: `estimate` gives it [W] for weights [W, N] of the pictures."""
        values = estimate(torch.cat([torch.ones_like(self.weights[:1]), self.weights]))
        self.metrics[name] = float(values[0])
        self._keep(name, values[1:])

    def _keep(self, name: str, resampled: Tensor) -> None:
        if bool(resampled.isfinite().all()):  # else there are too few pictures for an interval
            self.resampled[name] = resampled
