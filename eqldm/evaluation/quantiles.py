"""Quantiles of Student's t and of the beta distribution, which torch does not have.

(mpmath, which comes with torch, has the incomplete beta function, but its series does not converge for some ten thousand pictures.)
"""

from __future__ import annotations

import math
from functools import lru_cache


def beta_share(x: float, a: float, b: float) -> float:
    """P(X < x) of X ~ Beta(a, b), the regularised incomplete beta function; x in [0, 1], a > 0, b > 0.

    Source: DLMF 8.17.22, the continued fraction, by the modified method of Lentz.
    """
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the other side converges sooner
        return 1 - beta_share(1 - x, b, a)
    upper = fraction = 1.0
    lower = 1 / _nonzero(1 - (a + b) * x / (a + 1))
    fraction = lower
    for m in range(1, 10_000):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            lower = 1 / _nonzero(1 + factor * lower)
            upper = _nonzero(1 + factor / upper)
            fraction *= lower * upper
        if abs(lower * upper - 1) < 1e-15:
            break
    return math.exp(_log_density(x, a, b)) * x * (1 - x) * fraction / a


def _nonzero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300


def _log_density(x: float, a: float, b: float) -> float:
    """Of Beta(a, b) at x in (0, 1)."""
    return math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + (a - 1) * math.log(x) + (b - 1) * math.log1p(-x)


@lru_cache(maxsize=100_000)
def beta_quantile(share: float, a: float, b: float) -> float:
    """x in (0, 1) with P(X < x) = share of X ~ Beta(a, b), by Newton's method within a bracket. share: in (0, 1)."""
    low, high, x = 0.0, 1.0, a / (a + b)
    for _ in range(200):
        excess = beta_share(x, a, b) - share
        low, high = (low, x) if excess > 0 else (x, high)
        log_density = _log_density(x, a, b)
        step = x - excess / math.exp(log_density) if abs(log_density) < 600 else low
        following = step if low < step < high else (low + high) / 2
        if abs(following - x) <= 1e-13 * x:
            break
        x = following
    return following


@lru_cache(maxsize=10_000)
def t_quantile(level: float, degrees: float) -> float:
    """t with P(|T| < t) = level of Student's t of `degrees` of freedom."""
    x = beta_quantile(level, 0.5, degrees / 2)
    return math.sqrt(degrees * x / (1 - x))


def t_tail(t: float, degrees: float) -> float:
    """P(|T| > t) of Student's t of `degrees` of freedom."""
    return beta_share(degrees / (degrees + t * t), degrees / 2, 0.5)
