"""Quantiles, against mpmath's incomplete beta function and tables: the right ones are asked for."""

from __future__ import annotations

import mpmath
import pytest

from eqldm.evaluation.quantiles import beta_quantile, t_quantile, t_tail


@pytest.mark.parametrize(("a", "b"), [(1, 32), (3.3, 60.1), (30.2, 600.7), (300.5, 320.2), (0.3, 5), (2, 12), (0.5, 0.5), (700, 1)])
def test_beta(a, b):
    for share in (1e-6, 0.0005, 0.025, 0.5, 0.975, 0.9999):
        x = beta_quantile(share, a, b)
        assert float(mpmath.betainc(a, b, 0, x, regularized=True)) == pytest.approx(share, rel=1e-7)


def test_beta_of_a_great_many():
    assert beta_quantile(0.975, 1, 1e5) == pytest.approx(-(0.025 ** (1 / 1e5) - 1), rel=1e-9)
    assert beta_quantile(0.025, 5e5, 5e5) == pytest.approx(0.5 - 1.959964 * 0.5 / 1e3, rel=1e-6)


def test_t():
    for degrees, value in ((1, 12.7062), (3, 3.18245), (24, 2.06390), (675, 1.96348), (1e6, 1.95997)):
        assert t_quantile(0.95, degrees) == pytest.approx(value, rel=1e-5) and t_tail(value, degrees) == pytest.approx(0.05, rel=1e-4)
    assert t_tail(0, 5) == 1 and t_tail(-1e9, 5) < 1e-40
