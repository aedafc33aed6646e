"""The Fréchet distance of two sets of features, each seen as a Gaussian (arXiv 1706.08500, equation 6).

Shapes: features (N,D) and (M,D); mean (D,); covariance (D,D). Computed in float64.

The value rises as sets get smaller, by an amount that depends on the features: compare it only with values of the same
network and the same counts (arXiv 1911.07023). The kernel distance has no such bias.
"""

import torch
from torch import Tensor

from hdm_lightning.evaluation.bootstrap import Bootstrap, Estimate, Rows


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2(C₁C₂)^½) of two Gaussians.

    The trace of the root is that of (C₁^½ C₂ C₁^½)^½, which is symmetric, so that its eigenvalues are real.

    Args:
        first, second: mean (D,) and covariance (D,D).
    """
    (mean_one, cov_one), (mean_two, cov_two) = first, second
    values, vectors = torch.linalg.eigh(cov_one.double())
    root = vectors * values.clamp(min=0).sqrt()
    inner = torch.linalg.eigvalsh(root.T @ cov_two.double() @ root)
    offset = (mean_one.double() - mean_two.double()).square().sum()
    spread = cov_one.double().trace() + cov_two.double().trace() - 2 * inner.clamp(min=0).sqrt().sum()
    return float(offset + spread)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D,D) of features (N,D), in float64."""
    values = features.double()
    return values.mean(0), torch.cov(values.T).reshape(values.shape[1], values.shape[1])


def frechet_needs(width: int) -> int:
    """Samples of each set that the distance needs: with fewer, covariances of D features have no full rank."""
    return width + 1


def frechet_estimate(real: Tensor, generated: Tensor, bootstrap: Bootstrap, *, paired: bool = False) -> Estimate:
    """The distance of two sets with a centred percentile interval over samples of both.

    Args:
        real: (N,D).
        generated: (M,D).
        bootstrap: every resample costs two eigenvalue problems of size D.
        paired: row i of one was made from row i of the other, as a reconstruction from its picture. What one set of
            pictures has by chance is then in both, and counts for less than between sets of different pictures.

    Raises:
        ValueError: a set has too few samples for its covariance.
    """
    if real.shape[1:] != generated.shape[1:] or real.dim() != 2:
        raise ValueError(f"generated: got shape {tuple(generated.shape)}, expected (M, {real.shape[-1]})")
    fewest, needed = min(len(real), len(generated)), frechet_needs(real.shape[1])
    if fewest < needed:
        raise ValueError(f"features: got {fewest} samples of {real.shape[1]} features, expected at least {needed}")
    first, second = real.double(), generated.double()

    def distance(one: Rows, other: Rows) -> float:
        rows = (torch.from_numpy(one).to(first.device), torch.from_numpy(other).to(second.device))
        return frechet_distance(moments(first[rows[0]]), moments(second[rows[1]]))

    return bootstrap.sets(distance, len(real), len(generated), bounds=(0.0, float("inf")), paired=paired)
