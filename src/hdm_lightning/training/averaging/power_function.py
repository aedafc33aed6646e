"""Power-function averages of weights and how any other one is put together from stored ones (arXiv 2312.02696).

An average at time t (in samples) weighs the weights of time τ ≤ t by the profile p(τ) = (γ+1) τ^γ / t^(γ+1). Its
relative width σ is the profile's standard deviation over t.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDEST = 0.28
"""Largest relative width; at 1/√12 ≈ 0.289 the average is the plain mean of all weights."""

_ROUNDING = 1e-11
"""Singular values of the inner products below this share of the largest are rounding errors."""


class Profile(NamedTuple):
    """A power-function profile.

    Attributes:
        samples: t, the time it ends, above 0.
        gamma: its exponent γ.
    """

    samples: float
    gamma: float


def gamma_of(sigma_rel: float) -> float:
    """Exponent of a relative width (section 3.1 there: σ² (γ+2)² (γ+3) = γ+1).

    Raises:
        ValueError: the width is not in (0, `WIDEST`].
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel is {sigma_rel}; expected a width above 0 and at most {WIDEST}")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(np.real(roots).max())


def step_decay(sigma_rel: float, samples_seen: float, step: float) -> float:
    """What an average keeps of itself in the step of `step` samples that ends at `samples_seen` (section 3.1 there).

    Steps multiply to the profile exactly, for weights that stand still within a step: ∏ β telescopes.
    """
    return float(max(0.0, 1.0 - step / samples_seen) ** (gamma_of(sigma_rel) + 1.0))


def inner_product(one: Profile, other: Profile) -> float:
    """Integral of the product of two profiles over all time, in closed form (appendix C there)."""
    first, last = sorted((one, other), key=lambda profile: profile.samples)
    exponent = one.gamma + other.gamma + 1.0
    ratio = first.samples / last.samples
    share = (one.gamma + 1.0) * (other.gamma + 1.0) / exponent
    return share * ratio**last.gamma / last.samples


def combination(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Coefficients (n,) of the stored averages whose sum is nearest to the wanted average, in mean square of profiles.

    They sum to 1, so that weights keep their scale; within that, least squares as in section 3.2 there.

    Raises:
        ValueError: nothing is stored, or nothing at or before the wanted time.
    """
    if not stored:
        raise ValueError("stored is empty; expected at least one profile")
    if min(profile.samples for profile in stored) > wanted.samples:
        raise ValueError(f"wanted ends at {wanted.samples} samples, before every stored profile")
    scaled = [Profile(profile.samples / wanted.samples, profile.gamma) for profile in stored]
    target = Profile(1.0, wanted.gamma)
    # Scaled to unit norm, else narrow early profiles would drown the rest in rounding errors.
    norms = np.array([inner_product(profile, profile) for profile in scaled]) ** 0.5
    products = np.array([[inner_product(one, other) for other in scaled] for one in scaled]) / np.outer(norms, norms)
    aims = np.array([inner_product(profile, target) for profile in scaled]) / norms
    return _constrained(products, aims, 1.0 / norms) / norms


def residual(stored: Sequence[Profile], wanted: Profile, coefficients: np.ndarray) -> float:
    """Distance of the combined profile from the wanted one, as a share of the wanted one's norm."""
    profiles = [*stored, wanted]
    signed = np.append(coefficients, -1.0)
    products = np.array([[inner_product(one, other) for other in profiles] for one in profiles])
    return float(np.sqrt(max(0.0, signed @ products @ signed) / inner_product(wanted, wanted)))


def _constrained(products: np.ndarray, aims: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Minimum of xᵀAx − 2bᵀx with sᵀx = 1, A symmetric and nearly singular: by its eigenvectors above rounding."""
    values, vectors = np.linalg.eigh(products)
    kept = values > _ROUNDING * values.max()
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    free, along = inverse @ aims, inverse @ sums
    return np.asarray(free + along * (1.0 - sums @ free) / (sums @ along))
