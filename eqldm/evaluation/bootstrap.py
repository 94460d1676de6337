"""Intervals by resampling. Methods are compared on the same pairs of letters and seeds, so their differences are resampled as one.

Pictures of one pair of letters are alike, whatever their seeds: what is drawn anew is pairs, each with all its pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bootstrap_weights(clusters: Tensor, num_resamples: int = 2000, seed: int = 0) -> Tensor:
    """[R, N] float64 counts of N pictures in R resamples of their clusters, drawn with replacement.

    clusters: [N] cluster number of each picture, 0 to K - 1. Equal arguments give equal counts: the pairing of comparisons.
    """
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
