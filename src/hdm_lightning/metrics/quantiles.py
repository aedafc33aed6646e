"""Student's t in plain Python: for few trainings or few combinations the normal's 1.96 is far too small."""

from math import exp, lgamma, log, log1p
from statistics import NormalDist

_STEPS, _CLOSE = 300, 1e-14


def normal_quantile(share: float) -> float:
    """Return the quantile of the standard normal."""
    return NormalDist().inv_cdf(share)


def t_tail(value: float, freedom: float) -> float:
    """Return the two-sided p-value: the share of Student's t beyond ±|value|."""
    return incomplete_beta(freedom / (freedom + value**2), freedom / 2, 0.5)


def t_quantile(share: float, freedom: float) -> float:
    """Return the quantile of Student's t with `freedom` degrees of freedom, by bisection."""
    if share < 0.5:
        return -t_quantile(1 - share, freedom)
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > 2 * (1 - share):
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 2 * (1 - share) else (low, middle)
    return (low + high) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b) (DLMF 8.17.22, Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    numerator, denominator = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = denominator
    for m in range(1, _STEPS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            denominator = 1 / (1 + term * denominator)
            numerator = 1 + term / numerator
            fraction *= numerator * denominator
        if abs(numerator * denominator - 1) < _CLOSE:
            break
    return front * fraction
