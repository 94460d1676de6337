"""Resampling: whole clusters, paired, and intervals that cover."""

from __future__ import annotations

import pytest
import torch

from eqldm.evaluation.bootstrap import bootstrap_weights, interval, weighted_mean


def test_clusters_are_drawn_whole_and_the_same_for_all():
    clusters = torch.tensor([0, 0, 1, 2, 1, 2])
    weights = bootstrap_weights(clusters, 500)
    assert weights.shape == (500, 6)
    assert torch.equal(weights[:, 0], weights[:, 1]) and torch.equal(weights[:, 2], weights[:, 4])
    assert torch.equal(weights[:, [0, 2, 3]].sum(1), torch.full((500,), 3.0, dtype=torch.float64))
    assert torch.equal(weights, bootstrap_weights(clusters, 500)) and not torch.equal(weights, bootstrap_weights(clusters, 500, seed=1))


def test_weighted_mean():
    values, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
    assert weighted_mean(values, weights).tolist() == pytest.approx([3.0, 10 / 3])


def test_the_interval_is_that_of_the_mean():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator)
    low, high = interval(weighted_mean(values, bootstrap_weights(torch.arange(400))))
    assert (high - low) / 2 == pytest.approx(1.96 * float(values.std()) / 20, rel=0.1)
    assert low < float(values.mean()) < high


def test_pictures_of_one_pair_are_no_new_evidence():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100, generator=generator).repeat_interleave(4)
    alone = interval(weighted_mean(values, bootstrap_weights(torch.arange(400))))
    together = interval(weighted_mean(values, bootstrap_weights(torch.arange(100).repeat_interleave(4))))
    assert (together[1] - together[0]) / (alone[1] - alone[0]) == pytest.approx(2, rel=0.15)
