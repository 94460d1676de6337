"""Quantiles of Student's t and of the beta distribution (scipy.special, for scipy.stats takes a second to import)."""

from __future__ import annotations

from scipy.special import betaincinv, stdtr, stdtrit


def beta_quantile(share: float, a: float, b: float) -> float:
    """x in (0, 1) with P(X < x) = share of X ~ Beta(a, b); share: in (0, 1)."""
    return float(betaincinv(a, b, share))


def t_quantile(level: float, degrees: float) -> float:
    """t with P(|T| < t) = level of Student's t of `degrees` of freedom."""
    return float(stdtrit(degrees, (1 + level) / 2))


def t_tail(t: float, degrees: float) -> float:
    """P(|T| > t) of Student's t of `degrees` of freedom."""
    return 2 * float(stdtr(degrees, -abs(t)))
