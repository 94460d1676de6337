"""What a study over trainings, pairs and judges may claim: the right coverage, the right shares, exact permutations."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy.stats import spearmanr

from crossed import contrast, permutation_p, rank_correlation
from eqldm.evaluation.anagram import letter_tuples, unordered

SOURCES = ("training seed", "pair", "judge")


@pytest.mark.parametrize("spreads", [(1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (0.3, 1.0, 0.2), (0, 0, 0)])
def test_intervals_hold_the_truth_for_new_seeds_pairs_and_judges(spreads):
    """Of random effects of any of the three, with a residual: at least 93 % of intervals hold the mean, for 3 seeds and 4 judges too."""
    generator, held, tries = torch.Generator().manual_seed(2), 0, 1200
    for _ in range(tries):
        effects = [scale * torch.randn(count, generator=generator) for scale, count in zip(spreads, (3, 60, 4))]
        noise = torch.randn(3, 60, 4, generator=generator)
        values = 0.2 + effects[0][:, None, None] + effects[1][None, :, None] + effects[2] + noise
        low, high = contrast(values, SOURCES).bounds
        held += low <= 0.2 <= high
    assert held / tries >= 0.93


def test_what_an_interval_of_pairs_alone_would_claim_is_not_claimed():
    """Two trainings differ by their seeds alone: 300 pairs read by 4 judges are sure of it, and wrong."""
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([0.05, 0.02, 0.06])[:, None, None] + 0.05 * torch.randn(3, 300, 4, generator=generator)
    found = contrast(values, SOURCES)
    assert found.bounds[0] < 0 < found.bounds[1] and found.p > 0.05 and found.shares["training seed"] > 0.9
    by_pairs = values.mean((0, 2))
    assert float(by_pairs.mean()) > 10 * float(by_pairs.std()) / math.sqrt(300)


def test_no_level_no_claim():
    with pytest.raises(ValueError, match="judge: got one level, wanted two or more"):
        contrast(torch.randn(3, 10, 1), SOURCES)
    with pytest.raises(ValueError, match="wanted a dimension for each"):
        contrast(torch.randn(3, 10), SOURCES)
    assert contrast(torch.zeros(2, 2, 2), SOURCES).p == 1.0
    assert math.isnan(contrast(torch.ones(2, 2, 2), SOURCES).p)  # differences that never vary say nothing of how they would


def test_permutations_are_exact():
    assert permutation_p([4, 5, 6], [1, 2, 3]) == pytest.approx(2 / 20)
    assert permutation_p([1, 2, 3], [1, 2, 3]) == 1.0
    assert permutation_p([1.0, 5.0], [1.1, 4.9]) == 1.0


def test_ranks():
    rising = [0.1, 0.5, 0.9, 4.0, 5.0]
    assert rank_correlation(rising, [math.exp(x) for x in rising]) == (pytest.approx(1.0), pytest.approx(2 / 120))
    assert rank_correlation(rising, [-x for x in rising])[0] == pytest.approx(-1.0)
    x = torch.randn(9, generator=torch.Generator().manual_seed(0)).tolist()
    rho, p = rank_correlation(x, [a + 1e-3 for a in x])
    assert rho == pytest.approx(1.0) and p < 1e-3 and all(a <= b for a, b in pairwise(sorted(x)))


def test_equal_values_have_equal_ranks():
    """Rates that no method reaches are all 0: their order in the table said rho = 1, p = .003."""
    rho, p = rank_correlation([1, 2, 3, 4, 5, 6], [0.0] * 6)
    assert math.isnan(rho) and p == 1.0
    x, y = [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]
    assert rank_correlation(x, y) == (pytest.approx(spearmanr(x, y).statistic), pytest.approx(0.5))
    assert rank_correlation(x, y)[0] == pytest.approx(rank_correlation([1.0, 3.0, 2.0, 4.0], y)[0])


def test_levels_that_are_alike_count_once():
    """Pairs of letters in either order are one task: a quarter of 300 pairs are another one turned, and p < .05 came in 8 % of draws."""
    clusters = unordered(letter_tuples(300).T)
    generator, wrong, tries = torch.Generator().manual_seed(4), 0, 600
    for _ in range(tries):
        of_task = torch.randn(int(clusters.max()) + 1, generator=generator)[clusters]
        values = of_task[None, :, None] + 0.2 * torch.randn(3, 300, 3, generator=generator)
        wrong += contrast(values, SOURCES, {"pair": clusters}).p < 0.05
    assert wrong / tries <= 0.07
    values = torch.randn(3, 40, 2, generator=generator)
    assert contrast(values, SOURCES, {"pair": torch.arange(40)}) == contrast(values, SOURCES)
    with pytest.raises(ValueError, match="pair: got one level"):
        contrast(values, SOURCES, {"pair": torch.zeros(40, dtype=torch.long)})
