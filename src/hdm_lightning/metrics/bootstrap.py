"""Intervals of means, medians and shares, and of distances between two sets.

Shapes: N samples, M samples of the other set, R resamples.

There are three kinds, and each estimate names its own:

- *percentile*, for means and medians over samples: the quantiles of the value over resamples (Efron 1979).
- *Wilson's score interval*, for shares: at 32 to 128 trials, quantiles of resamples that claim 95% contain a true share
  near 0 or 1 in only 87% of the cases.
- *centered percentile*, for distances and neighbor statistics of sets: resampling with replacement itself shifts such
  a value (fewer distinct samples, copies at distance zero), so plain quantiles would miss it. The quantiles are
  shifted so that the resamples' mean falls on the value. The interval is then one of the expected value at these
  sample counts; any bias of the value at these counts remains. On simulated Gaussians such intervals cover that
  expectation in 95% of the trials or slightly more, whereas plain quantiles of a Fréchet distance hardly ever do.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hdm_lightning.metrics.proportions import Units, clustered_interval, count_units, share_interval

WILSON = "Wilson score"
PERCENTILE = "percentile bootstrap"
CENTRED = "centred percentile bootstrap"
FLOOR = "bootstrap of the reference against itself"

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        samples: number of independent samples behind it; for two sets, the smaller one.
        method, resamples: how the interval was computed, and from how many resamples.
    """

    value: float
    low: float
    high: float
    samples: int
    method: str = PERCENTILE
    resamples: int = 0


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the intervals.

    Args:
        resamples: R; more make the bounds steadier, not the interval narrower.
        seed: seed of the resampling; equal seeds draw the same rows for equal counts.
        confidence: share of such intervals that contain the true value.

    Raises:
        ValueError: a number is out of range.
    """

    resamples: int = 1000
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 2:
            raise ValueError(f"resamples: got {self.resamples}, expected at least 2")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence: got {self.confidence}, expected between 0 and 1")

    def counts(self, samples: int, stream: int = 0, size: int | None = None) -> NDArray[np.int64]:
        """Return how often each sample occurs in each resample, (R, N); `stream` keeps the sets of one statistic apart.

        A resample has `size` samples, by default N.
        """
        random = np.random.default_rng([self.seed, stream])
        return random.multinomial(size or samples, np.full(samples, 1 / samples), size=self.resamples)

    def rows(self, samples: int, stream: int = 0, size: int | None = None) -> Rows:
        """Return the samples in each resample, (R, N), or (R, size)."""
        random = np.random.default_rng([self.seed, stream])
        return random.integers(samples, size=(self.resamples, size or samples))

    def mean(self, values: ArrayLike) -> Estimate:
        """Estimate the mean of values (N,)."""
        found = _checked(values)
        return self.percentile(float(found.mean()), self.counts(len(found)) @ found / len(found), len(found))

    def median(self, values: ArrayLike) -> Estimate:
        """Estimate the median of values (N,)."""
        found = _checked(values)
        replicates = np.median(found[self.rows(len(found))], axis=1)
        return self.percentile(float(np.median(found)), replicates, len(found))

    def share(self, hits: ArrayLike) -> Estimate:
        """Estimate the share of true values among independent hits (N,)."""
        found = _checked(hits)
        share = float(found.mean())
        return Estimate(share, *share_interval(share, len(found), self.confidence), len(found), WILSON)

    def clustered_share(self, right: ArrayLike, trials: ArrayLike, units: Units) -> Estimate:
        """Estimate Σ right / Σ trials of images (N,), with an interval over their units; see `clustered_interval`."""
        hits, asked = _checked(right), _checked(trials)
        interval = clustered_interval(hits, asked, units, self.confidence)
        used = [names for names, each in zip(units, asked, strict=True) if each]
        method = f"{WILSON} over {count_units(used)} combinations"
        return Estimate(float(hits.sum() / asked.sum()), *interval, len(used), method)

    def sets(
        self,
        statistic: Callable[[Rows, Rows], float],
        first: int,
        second: int,
        *,
        bounds: tuple[float, float] = (-inf, inf),
        paired: bool = False,
    ) -> Estimate:
        """Estimate a statistic of two sets of N and M samples.

        Args:
            statistic: takes the rows to use of each set; called with all rows once, and with R pairs of resampled rows.
            first, second: N and M.
            bounds: range of the statistic; the interval is clipped to it. A range of 0 to 1 means that it is a share.
            paired: sample i of one set belongs to sample i of the other, so both are resampled alike.

        Raises:
            ValueError: sets of different sizes are passed as paired.
        """
        if paired and first != second:
            raise ValueError(f"second: got {second} samples, expected {first}, one for each of the first set")
        value = statistic(np.arange(first), np.arange(second))
        pairs = zip(self.rows(first, stream=1), self.rows(second, stream=1 if paired else 2), strict=True)
        replicates = np.array([statistic(one, other) for one, other in pairs])
        return self.centred(value, replicates, min(first, second), bounds=bounds)

    def percentile(self, value: float, replicates: Floats, samples: int) -> Estimate:
        """Return the estimate whose interval is the quantiles of its replicates (R,)."""
        low, high = self._quantiles(replicates)
        return Estimate(value, low, high, samples, PERCENTILE, len(replicates))

    def of_floor(self, replicates: Floats, samples: int) -> Estimate:
        """Summarize a distance's replicates (R,) between resamples of one set: their mean and the range of most."""
        return Estimate(float(replicates.mean()), *self._quantiles(replicates), samples, FLOOR, len(replicates))

    def centred(
        self, value: float, replicates: Floats, samples: int, *, bounds: tuple[float, float] = (-inf, inf)
    ) -> Estimate:
        """Return the estimate whose interval is the quantiles of its replicates (R,), shifted to center on the value.

        Replicates that are not finite are dropped: with very few samples, a resample can be one sample repeated,
        which has no pairs.
        """
        finite = replicates[np.isfinite(replicates)]
        if len(finite) < 2:
            raise ValueError(f"replicates: got {len(finite)} finite ones, expected at least 2")
        low, high = self._quantiles(finite - finite.mean() + value)
        low, high = max(low, bounds[0]), min(high, bounds[1])
        estimate = Estimate(value, min(low, value), max(high, value), samples, CENTRED, len(finite))
        return self._opened(estimate) if bounds == (0.0, 1.0) else estimate

    def _opened(self, share: Estimate) -> Estimate:
        """Use the exact bound for the open end of a share of 0 or 1, whose resamples all agree."""
        reach = exact_reach(share.samples, self.confidence)
        if share.low == share.high == 0:
            return replace(share, high=reach)
        return replace(share, low=1 - reach) if share.low == share.high == 1 else share

    def _quantiles(self, replicates: Floats) -> tuple[float, float]:
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(replicates, [tail, 1 - tail])
        return float(low), float(high)


def exact_reach(samples: int, confidence: float) -> float:
    """Return how far from 0 or 1 the true share can be if all `samples` agree (Clopper and Pearson 1934)."""
    return float(1 - ((1 - confidence) / 2) ** (1 / samples))


def _checked(values: ArrayLike) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not found.size:
        raise ValueError(f"values: got shape {found.shape}, expected (N,) with at least one sample")
    return found
