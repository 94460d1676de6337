"""Resampling: whole clusters, paired; and intervals that cover, of means and of rates, however few the clusters or the hits."""

from __future__ import annotations

import math

import pytest
import torch

from eqldm.evaluation.bootstrap import (
    CONFIDENCE,
    Findings,
    bootstrap_weights,
    errors_between,
    rate_interval,
    spread_between,
    weighted_mean,
    worth,
)
from eqldm.evaluation.quantiles import t_quantile


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


def found(values: torch.Tensor, clusters: torch.Tensor, of: torch.Tensor | None = None) -> Findings:
    findings = Findings(clusters, 400)
    findings.ratio("x", values, torch.ones_like(values) if of is None else of)
    return findings


def test_the_interval_is_that_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    interval = found(values, torch.arange(400)).intervals["x"]
    assert (interval.high - interval.low) / 2 == pytest.approx(t_quantile(0.95, 399) * float(values.std()) / 20, rel=1e-6)
    assert (interval.high + interval.low) / 2 == pytest.approx(float(values.mean()), abs=1e-6) and interval.num_clusters == 400


def test_pictures_of_one_pair_are_no_new_evidence():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    once = found(values, torch.arange(100)).intervals["x"]
    again = found(values.repeat_interleave(4), torch.arange(100).repeat_interleave(4)).intervals["x"]
    assert (again.low, again.high) == pytest.approx((once.low, once.high), abs=1e-6) and again.num_clusters == 100


def test_the_spread_is_that_of_the_resamples_with_the_factor():
    """Of a ratio, of clusters that are not equal."""
    generator = torch.Generator().manual_seed(1)
    clusters = torch.randint(40, (300,), generator=generator)
    values, of = torch.rand(300, generator=generator) + clusters / 40, torch.rand(300, generator=generator) + 0.5
    findings = Findings(clusters, 4000)
    findings.ratio("x", values, of)
    drawn = float(findings.resampled["x"].std()) * math.sqrt(40 / 39)
    assert spread_between(errors_between(values, of, findings.clusters)) == pytest.approx(drawn, rel=0.05)


@pytest.mark.parametrize("num_clusters", [4, 8, 25])
def test_means_of_few_clusters_are_covered(num_clusters):
    """The percentile interval holds the mean of 4 clusters in 80 % of draws, this one in 95 %."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.arange(num_clusters).repeat_interleave(8)
    covered = 0
    for _ in range(400):
        values = torch.randn(num_clusters, 1, generator=generator) + torch.randn(num_clusters, 8, generator=generator)
        findings = Findings(clusters, 2)
        findings.mean("x", values.flatten())
        covered += findings.intervals["x"].low <= 0 <= findings.intervals["x"].high
    assert 0.93 <= covered / 400 <= 0.975


def hits(rate: float, count: int, size: int, alike: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(0 or 1 [count], clusters of `size`): `alike` is the correlation of two pictures of one cluster."""
    clusters = torch.arange(count) // size
    of_cluster, own = (torch.rand(count, generator=generator) < rate for _ in range(2))
    takes = torch.rand(count, generator=generator) < math.sqrt(alike)
    return torch.where(takes, of_cluster[clusters * size], own).double(), clusters


DESIGNS = [(1, 0.0), *((size, alike) for size in (4, 8) for alike in (0.0, 0.3, 1.0))]


def coverage(rate: float, count: int, size: int, alike: float, draws: int) -> float:
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(draws):
        values, clusters = hits(rate, count, size, alike, generator)
        interval = rate_interval(values, torch.ones_like(values), clusters)
        assert 0 <= interval.low <= float(values.mean()) <= interval.high <= 1 and interval.high - interval.low > 0
        covered += interval.low <= rate <= interval.high
    return covered / draws


@pytest.mark.parametrize("rate", [0.005, 0.02])
def test_rates_are_covered(rate):
    """The percentile interval holds .02 of 64 pictures in 73 % of draws."""
    assert min(coverage(rate, count, *design, 100) for count in (32, 256) for design in DESIGNS) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.005, 0.02, 0.05, 0.1, 0.5, 0.98])
@pytest.mark.parametrize("count", [32, 64, 256, 676])
def test_all_rates_are_covered(rate, count):
    """Where pictures are independent and hits are many it is close to 95 %; elsewhere it is more, up to 100 % where a hit is rare (below
    some five hits), and where clusters of independent pictures hold them."""
    assert min(coverage(rate, count, *design, 400) for design in DESIGNS) >= 0.93


@pytest.mark.parametrize(("size", "independent"), [(1, 64), (4, 16), (8, 8)])
def test_no_hits_leave_the_rate_open(size, independent):
    """As wide as of so many pictures as there are clusters: 1 - (.025)^(1 / n)."""
    clusters, bound = torch.arange(64) // size, 1 - 0.025 ** (1 / independent)
    none, every = (found(value * torch.ones(64), clusters).intervals["x"] for value in (0, 1))
    assert (none.low, none.high) == pytest.approx((0, bound)) and (every.low, every.high) == pytest.approx((1 - bound, 1))


def test_a_rate_is_worth_its_clusters_to_its_pictures():
    ones, clusters = torch.ones(400), torch.arange(400) // 4
    alike = (torch.arange(100) % 2).repeat_interleave(4)
    assert worth(alike, ones, clusters) == pytest.approx(100, rel=0.02)
    assert worth(torch.arange(400) % 2, ones, clusters) == 400  # two of each four
    assert worth(alike[::4], ones[::4], clusters[::4]) == 100
    few = torch.zeros(400)
    few[7] = 1
    assert worth(few, ones, clusters) == 100  # one hit does not tell how alike pictures are
    sizes = torch.tensor([0] * 10 + [1, 2])
    assert worth(torch.zeros(12), torch.ones(12), sizes) == pytest.approx(144 / 102)  # hardly more than one


def test_the_best_of_each_pair_is_a_rate():
    """Of those that count: the pictures that `of` leaves out are none, nor are clusters without any."""
    of = torch.tensor([1.0, 0] * 30 + [0.0, 0] * 10)
    values = of * (torch.arange(80) % 4 == 0)
    alone = found(values[:60:2], torch.arange(30))
    together = found(values, torch.arange(80) // 2, of)
    assert together.metrics == alone.metrics == {"x": 0.5} and together.intervals == alone.intervals
    assert together.intervals["x"].num_clusters == 30


def test_what_is_no_rate_is_not_taken_for_one():
    zeros = torch.zeros(40)
    findings = Findings(torch.arange(40))
    findings.mean("error", zeros, rate=False)  # of an autoencoder that turns exactly
    findings.ratio("ratio", zeros, 2 * torch.ones(40))
    assert all((each.low, each.high) == (0, 0) for each in findings.intervals.values()) and len(findings.intervals) == 2
    with pytest.raises(ValueError, match="loss is said to be a rate, but its values are not all 0 or 1"):
        findings.mean("loss", zeros + 0.5, rate=True)


def test_one_cluster_has_no_interval():
    findings = Findings(torch.zeros(9))
    findings.mean("rate", torch.ones(9))
    findings.mean("mean", torch.arange(9.0))
    findings.of_weights("other", lambda w: w.sum(1))
    assert findings.metrics == {"rate": 1, "mean": 4, "other": 9} and not findings.intervals and not findings.resampled


def test_what_is_no_mean_has_the_interval_of_its_resamples():
    values = torch.randn(12, generator=torch.Generator().manual_seed(0))
    findings = Findings(torch.arange(12), 4000)
    findings.mean("x", values)
    findings.of_weights("y", lambda w: weighted_mean(values, w))
    mean, other = findings.intervals["x"], findings.intervals["y"]
    assert (other.low, other.high) == pytest.approx((mean.low, mean.high), abs=0.05 * (mean.high - mean.low)) and CONFIDENCE == 0.95


def test_findings_of_some_pictures_are_taken_whole():
    clusters, values = torch.arange(40) // 2, (torch.arange(40) % 3 == 0).double()
    findings, some = Findings(clusters, 50), Findings(clusters[:20], 50)
    findings.mean("all", values)
    some.mean("some", values[:20])
    findings.take(some)
    assert findings.metrics.keys() == findings.intervals.keys() == findings.resampled.keys() == {"all", "some"}
    assert {name: each.num_clusters for name, each in findings.intervals.items()} == {"all": 20, "some": 10}
