"""Paired comparison of two models, statistics over several trainings of one recipe, and the sample sizes they need.

Shapes: N images, K trainings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, comb, inf

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hdm_lightning.metrics.bootstrap import exact_reach
from hdm_lightning.metrics.proportions import Units, count_independent, count_units, shared_variance
from hdm_lightning.metrics.quantiles import normal_quantile, t_quantile, t_tail

POWER = 0.8
_FINE = 1e-5
_ROUNDING = 1e-12


@dataclass(frozen=True)
class PairedDifference:
    """How much the second of two models differs from the first on the same images.

    Attributes:
        value, low, high: second − first, and its interval.
        p: two-sided p-value of no difference.
        inner: interval at twice the error rate; the two are equivalent at that level if it is within ±margin.
        smallest: difference that a comparison of so many images detects in 80% of the cases.
        units: number of independent units.
    """

    value: float
    low: float
    high: float
    p: float
    inner: tuple[float, float]
    smallest: float
    units: int

    def within(self, margin: float) -> bool:
        """Return whether the two are equivalent to within a margin (two one-sided tests, Schuirmann 1987)."""
        return -margin < self.inner[0] and self.inner[1] < margin


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    trials: ArrayLike | None = None,
    units: Units | None = None,
    confidence: float = 0.95,
) -> PairedDifference:
    """Compare the mean outcomes of two models (second − first) on the same images.

    Student's t over units. If every image changes alike, there is no spread to take an error from; see `_all_alike`.

    Args:
        first, second: outcomes (N,), image by image.
        trials: trials per image, (N,), if the outcomes are counts of right answers; 1 each by default.
        units: names that make images dependent, as for `clustered_interval`; by default all are independent.
        confidence: of the interval.

    Raises:
        ValueError: the lengths differ, or there are fewer than two units.
    """
    one, other = (np.asarray(values, dtype=np.float64) for values in (first, second))
    asked = np.ones_like(one) if trials is None else np.asarray(trials, dtype=np.float64)
    names = [[str(row)] for row in range(len(one))] if units is None else list(units)
    if not len(one) == len(other) == len(asked) == len(names) or not asked.sum():
        raise ValueError(f"second: got {len(other)} images, expected {len(one)}, the same ones, and at least one trial")
    chosen = np.flatnonzero(asked)
    used = [names[row] for row in chosen]
    change, weight = (other - one)[chosen], asked[chosen]
    value = float(change.sum() / weight.sum())
    number = count_independent(used)
    if number < 2:
        raise ValueError(f"units: got {number} independent, expected at least 2")
    right_or_wrong = set(np.unique([one, other])) <= {0.0, 1.0}
    residuals = change - value * weight
    if np.abs(residuals).max() <= _ROUNDING * np.abs([one, other]).max():
        return _all_alike(value, number, confidence, of_shares=trials is not None or right_or_wrong)
    error = _variance(residuals, used) ** 0.5 / float(weight.sum())
    freedom, beyond = number - 1, (1 - confidence) / 2
    reach, inner = (t_quantile(1 - share, freedom) * error for share in (beyond, 2 * beyond))
    p = t_tail(value / error, freedom)
    if units is None and trials is None and right_or_wrong:
        p = mcnemar(int(((one == 1) & (other == 0)).sum()), int(((one == 0) & (other == 1)).sum()))
    smallest = (t_quantile(1 - beyond, freedom) + t_quantile(POWER, freedom)) * error
    return PairedDifference(value, value - reach, value + reach, p, (value - inner, value + inner), smallest, number)


def _variance(residuals: NDArray[np.float64], units: Units) -> float:
    """Return the variance of the sum of residuals, at least that of independent images.

    For pairs of units the sum of products is not a square, so chance can make it small or negative, most of all if
    nothing depends on anything.
    """
    count = count_units(units)
    return max(shared_variance(residuals, units), float(residuals @ residuals) * count / (count - 1))


def _all_alike(value: float, number: int, confidence: float, *, of_shares: bool) -> PairedDifference:
    """Return the difference when all of `number` independent units changed by `value`.

    p is from the sign test. For shares, the proportion of units that change otherwise is at most the exact bound of one
    that was never seen (Clopper and Pearson 1934), and each changes by −1 to 1. Other numbers have no range to bound
    them, so their interval is the value alone.
    """
    p = min(1.0, 2 * 0.5**number) if value else 1.0
    unseen = exact_reach(number, confidence) if of_shares else 0.0
    low, high = value - unseen * (1 + value), value + unseen * (1 - value)
    return PairedDifference(value, low, high, p, (low, high), unseen, number)


def mcnemar(lost: int, gained: int) -> float:
    """Return McNemar's exact p-value (1947, binomial) from the images that only one of the two models gets right."""
    count = lost + gained
    tail = sum(comb(count, number) for number in range(min(lost, gained) + 1)) / 2**count
    return min(1.0, 2 * tail)


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values so that they hold for the whole family (Holm 1979)."""
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=lambda each: ps[each])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in ps}


@dataclass(frozen=True)
class OverTrainings:
    """A number over K trainings that differ only in their seed.

    Attributes:
        mean, least, most: of the K values.
        logit_centre: for shares, the share at the mean logit, which [low, high] is centered on; for skewed shares it is
            not `mean`, which can even be outside. None for other numbers, whose interval is centered on `mean`.
        low, high: interval of that center over all such trainings (Student's t).
        next_low, next_high: interval of one further training, at the same confidence.
    """

    mean: float
    least: float
    most: float
    low: float
    high: float
    next_low: float
    next_high: float
    trainings: int
    logit_centre: float | None = None


def over_trainings(
    values: Sequence[float], *, trials: Sequence[int] | None = None, confidence: float = 0.95
) -> OverTrainings:
    """Summarize a number of K ≥ 2 trainings: center ± t·s/√K, and for one further run center ± t·s·√(1 + 1/K).

    Args:
        values: (K,); shares if `trials` is given.
        trials: number of trials of each share. The intervals are then those of logit((right + ½) / (trials + 1)), so
            they stay between 0 and 1, and t·s is never less than what binomial sampling alone gives: runs that agree in
            every answer may still differ in the next. The interval of one further run is of its share as observed.
        confidence: of both intervals.

    Raises:
        ValueError: there are fewer than two trainings, or `trials` has another length.
    """
    count = len(values)
    if count < 2 or (trials is not None and len(trials) != count):
        raise ValueError(f"values: got {count}, expected at least 2 trainings, and the trials of each or of none")
    seen = np.asarray(values, dtype=np.float64)
    share = None
    if trials is None:
        low, high, next_low, next_high = _ends(*_centre_and_reach(seen, confidence), count)
    else:
        asked = np.asarray(trials, dtype=np.float64)
        shrunk, each = (seen * asked + 0.5) / (asked + 1), float(asked.mean())
        centre, reach = _centre_and_reach(np.log(shrunk / (1 - shrunk)), confidence)
        share = _from_logit(centre)
        reach = max(reach, normal_quantile((1 + confidence) / 2) * (each * share * (1 - share)) ** -0.5)
        low, high, *further = (_from_logit(end) for end in _ends(centre, reach, count))
        next_low, next_high = (min(1.0, max(0.0, (end * (each + 1) - 0.5) / each)) for end in further)
    mean, least, most = float(seen.mean()), float(seen.min()), float(seen.max())
    return OverTrainings(mean, least, most, low, high, next_low, next_high, trainings=count, logit_centre=share)


def _centre_and_reach(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Return the mean, and t times the standard deviation."""
    return float(values.mean()), t_quantile((1 + confidence) / 2, len(values) - 1) * float(values.std(ddof=1))


def _ends(centre: float, reach: float, count: int) -> list[float]:
    """Return the ends of the interval of the center over `count` runs, and those of one further run."""
    return [centre + sign * factor * reach for factor in (count**-0.5, (1 + 1 / count) ** 0.5) for sign in (-1, 1)]


def _from_logit(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


def images_to_tell(
    first: float, second: float, *, power: float = POWER, confidence: float = 0.95, design_effect: float = 1.0
) -> int:
    """Return how many independent prompts per model a test needs to tell two shares apart (Fleiss 1981, eq. 3.14).

    `design_effect`: factor by which prompts of one combination count less: 1 + (images per unit − 1) · correlation.

    Raises:
        ValueError: a share is outside [0, 1], or the two are equal, which no number tells apart.
    """
    if not (0 <= first <= 1 and 0 <= second <= 1) or first == second:
        raise ValueError(f"first, second: got {first:g} and {second:g}, expected two different shares in [0, 1]")
    middle = (first + second) / 2
    wrong, missed = normal_quantile((1 + confidence) / 2), normal_quantile(power)
    spread = first * (1 - first) + second * (1 - second)
    root = wrong * (2 * middle * (1 - middle)) ** 0.5 + missed * spread**0.5
    return ceil(design_effect * (root / (first - second)) ** 2)


def smallest_difference(
    share: float, prompts: int, *, power: float = POWER, confidence: float = 0.95, design_effect: float = 1.0
) -> float:
    """Return the smallest difference from `share`, toward the side with more room, that `prompts` of each model detect.

    `inf` if even the whole range is not enough.
    """
    sign = -1 if share >= 0.5 else 1
    options = {"power": power, "confidence": confidence, "design_effect": design_effect}
    near, far = 0.0, share if sign < 0 else 1 - share
    if images_to_tell(share, share + sign * far, **options) > prompts:
        return inf
    while far - near > _FINE:
        middle = (near + far) / 2
        enough = images_to_tell(share, share + sign * middle, **options) <= prompts
        near, far = (near, middle) if enough else (middle, far)
    return far
