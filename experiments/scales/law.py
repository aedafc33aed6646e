"""Loss by size and samples, L = E + A·N^−α + B·D^−β (arXiv 2203.15556, section 3.3), and the rate of least loss.

Shapes: K trainings, R resamples.

For fixed exponents the law is linear in E, A and B, none of which may be negative; the exponents are searched on a
grid, then on finer ones around the best. Residuals are relative: divided by the loss.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

EXPONENTS = (0.02, 2.0)
_GRID, _FINER = 25, 4
_UNIT_SIZE, _UNIT_SAMPLES = 1e6, 1e4


@dataclass(frozen=True)
class Law:
    """A fitted law; `size` is in parameters (or operations per sample), `samples` counts them."""

    floor: float
    of_size: float
    of_samples: float
    alpha: float
    beta: float

    def __call__(self, size: Vector, samples: Vector) -> Vector:
        """Return the loss."""
        by_size = self.of_size * (np.asarray(size) / _UNIT_SIZE) ** -self.alpha
        return self.floor + by_size + self.of_samples * (np.asarray(samples) / _UNIT_SAMPLES) ** -self.beta


def fit(size: Vector, samples: Vector, loss: Vector) -> Law:
    """Fit the law by least squares of relative residuals. Raises ValueError: sizes or samples vary too little."""
    for name, values in (("size", size), ("samples", samples)):
        if len(set(values)) < 3:
            raise ValueError(f"{name}: got {len(set(values))} different values, expected at least 3")
    alphas = betas = np.geomspace(*EXPONENTS, _GRID)
    for _ in range(_FINER):
        best = _best_on(size, samples, loss, alphas, betas)
        alphas, betas = (_around(grid, value) for grid, value in ((alphas, best.alpha), (betas, best.beta)))
    return best


def _around(grid: Vector, value: float) -> Vector:
    place = int(np.abs(np.log(grid / value)).argmin())
    return np.geomspace(grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)], 9)


def _best_on(size: Vector, samples: Vector, loss: Vector, alphas: Vector, betas: Vector) -> Law:
    """Return the best law over a grid of exponents and over subsets of the three terms (none may be negative)."""
    pairs = np.array(list(itertools.product(alphas, betas)))
    by_size = (size / _UNIT_SIZE)[None] ** -pairs[:, :1]
    by_samples = (samples / _UNIT_SAMPLES)[None] ** -pairs[:, 1:]
    columns = np.stack([np.ones_like(by_size), by_size, by_samples], axis=-1) / loss[None, :, None]
    best: tuple[float, Law] | None = None
    for active in ([0, 1, 2], [1, 2], [0, 1], [0, 2], [1], [2], [0]):
        part = columns[..., active]
        # A ridge far below the residuals keeps near-equal columns (exponents near 0) solvable.
        normal = part.transpose(0, 2, 1) @ part + 1e-10 * np.eye(len(active))
        weights = np.linalg.solve(normal, part.sum(axis=1)[..., None])[..., 0]
        left = ((part @ weights[..., None])[..., 0] - 1) ** 2
        error = np.where((weights >= 0).all(axis=1), left.sum(axis=1), np.inf)
        row = int(error.argmin())
        if best is None or error[row] < best[0] - 1e-15:
            whole = dict(zip(active, weights[row].tolist(), strict=True))
            best = float(error[row]), Law(*(whole.get(index, 0.0) for index in range(3)), *pairs[row].tolist())
    assert best is not None
    return best[1]


def resampled(size: Vector, samples: Vector, loss: Vector, *, count: int = 200, seed: int = 0) -> list[Law]:
    """Fit laws to resamples of the trainings, within each size and length (a stratified bootstrap)."""
    random = np.random.default_rng(seed)
    groups = [
        np.flatnonzero((size == one) & (samples == other))
        for one, other in sorted(set(zip(size, samples, strict=True)))
    ]
    found = []
    for _ in range(count):
        rows = np.concatenate([random.choice(group, len(group)) for group in groups])
        # Resamples of a few trainings spread too little: the factor n/(n−1) restores the variance.
        centre = np.concatenate([np.full(len(group), loss[group].mean()) for group in groups])
        wider = np.concatenate([np.full(len(group), (len(group) / max(len(group) - 1, 1)) ** 0.5) for group in groups])
        found.append(fit(size[rows], samples[rows], centre + wider * (loss[rows] - centre)))
    return found


@dataclass(frozen=True)
class Interval:
    """A number with its 95% interval; `at_edge` if it is the least or the largest tried, and so not an optimum."""

    value: float
    low: float
    high: float
    at_edge: bool = False


def interval(value: float, others: list[float]) -> Interval:
    """Return the percentile interval of resampled values."""
    low, high = np.quantile(others, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def predicted(law: Law, laws: list[Law], size: float, samples: float, noise: float, *, seed: int = 0) -> Interval:
    """Predict the loss of one more training, with the spread among trainings (`noise`, relative)."""
    random = np.random.default_rng(seed)
    draws = [float(each(size, samples)) * (1 + noise * random.standard_normal()) for each in laws for _ in range(20)]
    return interval(float(law(size, samples)), draws)


def best_rate(rate: Vector, loss: Vector) -> float:
    """Return the minimum of a parabola through the loss over the logarithm of the rate, within the rates tried.

    Only the rates next to the best on average are fitted: far away the loss is not a parabola.
    """
    values = np.unique(rate)
    means = np.array([loss[rate == each].mean() for each in values])
    place = int(np.clip(means.argmin(), 1, len(values) - 2))
    near = np.isin(rate, values[place - 1 : place + 2])
    bend, slope, _ = np.polyfit(np.log(rate[near]), loss[near], 2)
    if bend <= 0:
        return float(values[means.argmin()])
    return float(np.exp(np.clip(-slope / (2 * bend), *np.log(values[[0, -1]]))))


def best_rate_interval(
    rate: Vector, loss: Vector, seeds: Vector, *, spread: float | None = None, count: int = 500
) -> Interval:
    """Return the best rate with a parametric bootstrap: normal noise of the trainings' own spread on every loss.

    Args:
        rate, loss, seeds: (K,) of each training.
        spread: standard deviation of a training's loss, needed for a single seed, which has none of its own.
        count: R.
    """
    random = np.random.default_rng(0)
    own = seed_spread(rate, loss, seeds) if spread is None else spread
    found = [best_rate(rate, loss + own * random.standard_normal(len(loss))) for _ in range(count)]
    best = best_rate(rate, loss)
    at_edge = bool(np.isclose(best, [rate.min(), rate.max()]).any())
    return replace(interval(best, found), at_edge=at_edge)


def seed_spread(rate: Vector, loss: Vector, seeds: Vector) -> float:
    """Return the standard deviation of the loss after removing the effects of rates and seeds; nan with one seed."""
    rates, names = np.unique(rate), np.unique(seeds)
    columns = np.column_stack([*(rate == each for each in rates), *(seeds == each for each in names[1:])]).astype(float)
    left = loss - columns @ np.linalg.lstsq(columns, loss, rcond=None)[0]
    freedom = len(loss) - int(np.linalg.matrix_rank(columns))
    return float(np.sqrt(left @ left / freedom)) if freedom else float("nan")
