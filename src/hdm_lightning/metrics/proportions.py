"""Intervals of shares: of independent trials, of trials with units in common, and of the difference of two shares.

Shapes: N images; `right`, `trials` (N,): right answers among the trials of each.

Images of one combination ("small red star") are right or wrong together. The combinations are what is independent, and
the claim is about them. So the variance of a share sums the products of all residuals that have a unit in common:
one-way clustering with one unit per image, and for pairs of units the estimator of Aronow, Samii and Assenova 2015
(doi:10.1093/pan/mpv018). The interval is that of as many independent trials as give this variance, at most N.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hdm_lightning.metrics.quantiles import normal_quantile, t_quantile

Interval = tuple[float, float]
Units = Sequence[Sequence[str]]
"""For each image the names of what it is about; images with a name in common depend on each other."""


def wilson_interval(share: float, samples: float, deviations: float) -> Interval:
    """Return the score interval of a share of `samples` independent trials (Wilson 1927); it never leaves [0, 1]."""
    squared = deviations**2 / samples
    centre = (share + squared / 2) / (1 + squared)
    reach = deviations * (share * (1 - share) / samples + squared / (4 * samples)) ** 0.5 / (1 + squared)
    return min(share, max(0.0, centre - reach)), max(share, min(1.0, centre + reach))


def share_interval(share: float, samples: int, confidence: float) -> Interval:
    """Return Wilson's interval of a share of `samples` independent trials."""
    return wilson_interval(share, samples, normal_quantile((1 + confidence) / 2))


def clustered_interval(right: ArrayLike, trials: ArrayLike, units: Units, confidence: float) -> Interval:
    """Return the interval of Σ right / Σ trials over units.

    Wilson's interval with the effective count of trials (see above) and Student's t over units in place of the
    normal, as Korn and Graubard 1998 do with the exact interval. If all answers agree, that count is the number of
    units. A single unit says nothing about others: 0 to 1.

    Raises:
        ValueError: the lengths differ, or there is no trial.
    """
    hits, asked = (np.asarray(values, dtype=np.float64) for values in (right, trials))
    if not len(hits) == len(asked) == len(units) or not asked.sum():
        raise ValueError(f"units: got {len(units)} for {len(hits)} images, expected one each, and at least one trial")
    chosen = np.flatnonzero(asked)
    hits, asked = hits[chosen], asked[chosen]
    used = [units[int(row)] for row in chosen]
    share, number = float(hits.sum() / asked.sum()), count_units(used)
    if number < 2:
        return 0.0, 1.0
    spread = shared_variance(hits - share * asked, used) / asked.sum() ** 2
    own, images = share * (1 - share), len(used)
    effective = number if not own else min(images, own / spread) if spread > 0 else images
    return wilson_interval(share, effective, t_quantile((1 + confidence) / 2, number - 1))


def count_units(units: Units) -> int:
    """Return the number of different units."""
    return len({name for names in units for name in names})


def count_independent(units: Units) -> int:
    """Return how many of these images can be independent: at most as many as there are units, and images."""
    return min(len(units), count_units(units))


def shared_variance(residuals: NDArray[np.float64], units: Units) -> float:
    """Return the variance of the sum of residuals (N,), in which images with a unit in common depend on each other."""
    names = sorted({name for each in units for name in each})
    column = {name: number for number, name in enumerate(names)}
    member = np.zeros((len(units), len(names)))
    for row, each in enumerate(units):
        member[row, [column[name] for name in each]] = 1
    depends = member @ member.T > 0
    return float(residuals @ depends @ residuals) * len(names) / (len(names) - 1)


def difference_interval(first: float, of_first: Interval, second: float, of_second: Interval) -> Interval:
    """Return the interval of first − second for independent shares with their intervals (Newcombe 1998, method 10)."""
    low = first - second - ((first - of_first[0]) ** 2 + (of_second[1] - second) ** 2) ** 0.5
    high = first - second + ((of_first[1] - first) ** 2 + (second - of_second[0]) ** 2) ** 0.5
    return low, high
