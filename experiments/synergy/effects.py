"""Effects of a fractional design: least squares with blocks, estimable contrasts, tests of whole terms.

Shapes: J jobs, P = 6 blocks + 24 columns of effects.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from experiments.synergy.design import FACTORS, Cell, Planned, all_cells, model_matrix
from numpy.typing import NDArray

from hdm_lightning.metrics.quantiles import incomplete_beta, t_quantile, t_tail

Vector = NDArray[np.float64]

PRIMARY_TERMS = [*FACTORS, *(f"{one}:{other}" for one, other in itertools.combinations(FACTORS, 2))]
REFERENCE = {"skips": "none", "routing": "0", "eq": "off", "crop": "centre"}
"""Level without the technique; effects are relative to it."""
CONTRASTS = {
    "skips": [("none", "mirrored"), ("none", "last"), ("none", "concatenation"), ("last", "mirrored")],
    "routing": [("0", "0.5")],
    "eq": [("off", "on")],
    "crop": [("centre", "shifted"), ("centre", "buckets"), ("buckets", "shifted")],
}
"""Pairs of levels: the second compared with the first."""


@dataclass(frozen=True)
class Effect:
    """A difference between two levels, or between two such differences, with its 95% interval and p."""

    name: str
    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Fit:
    """Least-squares fit of one endpoint over the available jobs.

    Attributes:
        matrix: (J,P), `coefficients` (P,), `covariance` (P,P) without the error's variance.
        error: standard deviation of the residuals, on `freedom` degrees of freedom.
    """

    planned: list[Planned]
    matrix: Vector
    values: Vector
    coefficients: Vector
    covariance: Vector
    error: float
    freedom: int

    @classmethod
    def of(cls, planned: list[Planned], values: Vector) -> "Fit":
        """Fit; terms that the jobs so far cannot separate are included, and `effect` returns None for them."""
        matrix = model_matrix(planned)
        inverse = np.linalg.pinv(matrix)
        coefficients = inverse @ values
        freedom = len(values) - int(np.linalg.matrix_rank(matrix))
        left = float(((values - matrix @ coefficients) ** 2).sum())
        error = (left / freedom) ** 0.5 if freedom > 0 else float("nan")
        return cls(planned, matrix, values, coefficients, inverse @ inverse.T, error, freedom)

    def effect(self, name: str, weights: Vector) -> Effect | None:
        """Return a linear combination (P,) of the coefficients; None if the jobs do not determine it."""
        told = np.linalg.pinv(self.matrix) @ self.matrix
        if self.freedom < 1 or not np.allclose(weights @ told, weights, atol=1e-8):
            return None
        value = float(weights @ self.coefficients)
        spread = self.error * float(weights @ self.covariance @ weights) ** 0.5
        reach = t_quantile(0.975, self.freedom) * spread
        return Effect(name, value, value - reach, value + reach, t_tail(value / spread, self.freedom))

    def term_p(self, name: str) -> float | None:
        """Return p of the F test of all columns of a main effect or interaction; None if they cannot be estimated."""
        columns = _columns(name)
        rest = np.delete(self.matrix, columns, axis=1)
        lost = int(np.linalg.matrix_rank(self.matrix)) - int(np.linalg.matrix_rank(rest))
        if lost < len(columns) or self.freedom < 1:
            return None
        left = self.values - rest @ (np.linalg.pinv(rest) @ self.values)
        ratio = (float(left @ left) - self.freedom * self.error**2) / lost / self.error**2
        return incomplete_beta(self.freedom / (self.freedom + lost * ratio), self.freedom / 2, lost / 2)


def main_effects(fit: Fit) -> list[Effect]:
    """Return each contrast, averaged over all levels of the other factors with equal weight."""
    found = []
    for factor, pairs in CONTRASTS.items():
        for without, level in pairs:
            name = f"{factor}: {in_words(level)} against {in_words(without)}"
            found.append(fit.effect(name, _mean({factor: level}) - _mean({factor: without})))
    return [each for each in found if each is not None]


def interactions(fit: Fit) -> list[Effect]:
    """Return how much larger the effect of one technique is if the other is used as well."""
    found = []
    for one, other in itertools.combinations(FACTORS, 2):
        for first, second in itertools.product(_against_reference(one), _against_reference(other)):
            both = _mean({one: first[1], other: second[1]}) - _mean({one: first[0], other: second[1]})
            alone = _mean({one: first[1], other: second[0]}) - _mean({one: first[0], other: second[0]})
            found.append(fit.effect(f"{one} {in_words(first[1])} × {other} {in_words(second[1])}", both - alone))
    return [each for each in found if each is not None]


def over_autoencoders(fit: Fit) -> Effect | None:
    """Return the effect of EQ-VAE with autoencoder pairs as units: over other autoencoders, not other trainings."""
    blocks = sorted({each.block for each in fit.planned})
    if len(blocks) < 3:
        return None
    signs = np.array([1.0 if each.cell.eq == "on" else -1.0 for each in fit.planned])
    own = np.array(
        [[signs[row] if each.block == block else 0.0 for block in blocks] for row, each in enumerate(fit.planned)]
    )
    matrix = np.column_stack([np.delete(fit.matrix, _columns("eq"), axis=1), own])
    slopes = 2 * (np.linalg.pinv(matrix) @ fit.values)[-len(blocks) :]
    reach = t_quantile(0.975, len(blocks) - 1) * float(slopes.std(ddof=1)) / len(blocks) ** 0.5
    mean = float(slopes.mean())
    p = t_tail(mean / (reach / t_quantile(0.975, len(blocks) - 1)), len(blocks) - 1)
    return Effect(f"eq: on against off, over {len(blocks)} autoencoder pairs", mean, mean - reach, mean + reach, p)


def in_words(level: str) -> str:
    """Return the name of a level for tables."""
    return "center" if level == "centre" else level


def _against_reference(factor: str) -> list[tuple[str, str]]:
    return [(without, level) for without, level in CONTRASTS[factor] if without == REFERENCE[factor]]


def _mean(levels: dict[str, str]) -> Vector:
    """Return the row of the model matrix for the mean over all cells with these levels."""
    cells = [cell for cell in all_cells() if all(getattr(cell, name) == level for name, level in levels.items())]
    return model_matrix([Planned(cell, 0, 0) for cell in cells]).mean(axis=0)


def _columns(term: str) -> list[int]:
    """Return the positions of a term's columns in the model matrix."""
    width = {name: len(levels) - 1 for name, levels in FACTORS.items()}
    begin = model_matrix([Planned(Cell("none", "0", "off", "centre"), 0, 0)]).shape[1]
    sizes = {name: int(np.prod([width[part] for part in name.split(":")])) for name in PRIMARY_TERMS}
    begin -= sum(sizes.values())
    for name, size in sizes.items():
        if name == term:
            return list(range(begin, begin + size))
        begin += size
    raise KeyError(term)
