"""Kernel distances (squared maximum mean discrepancy, unbiased) of two sets of features.

Shapes: features (N,D) and (M,D); R resamples.

With the cubic kernel this is KID (arXiv 1801.01401, section 4); with the Gaussian kernel on unit-length CLIP features,
CMMD (arXiv 2401.09603, section 4). Unbiased, so that values of different counts compare; a value below zero is chance.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hdm_lightning.evaluation.bootstrap import Bootstrap, Estimate

Kernel = Callable[[Tensor, Tensor], Tensor]

FEWEST_SAMPLES = 2
CMMD_BANDWIDTH = 10.0
CMMD_SCALE = 1000.0
_BLOCK_ROWS = 1024


def cubic_kernel(first: Tensor, second: Tensor) -> Tensor:
    """(x·y / D + 1)³ of each pair, (N,M)."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def gaussian_kernel(first: Tensor, second: Tensor, *, bandwidth: float = CMMD_BANDWIDTH) -> Tensor:
    """exp(−‖x − y‖² / 2σ²) of each pair, (N,M)."""
    return torch.exp(-torch.cdist(first, second).square() / (2 * bandwidth**2))


def kernel_distance_estimate(
    real: Tensor, generated: Tensor, bootstrap: Bootstrap, *, kernel: Kernel = cubic_kernel, scale: float = 1.0
) -> Estimate:
    """The distance of two sets with a centred percentile interval over samples of both.

    All pairs count, not averages over small subsets. Pairs of a sample with itself, which resampling makes, are left
    out of the replicates as they are of the value.

    Args:
        real: (N,D).
        generated: (M,D).
        bootstrap: for the interval.
        kernel: of two sets of features, (N,M).
        scale: factor of the result.

    Raises:
        ValueError: the features do not belong together, or a set has fewer than two samples.
    """
    if real.dim() != 2 or real.shape[1:] != generated.shape[1:]:
        raise ValueError(f"generated: got shape {tuple(generated.shape)}, expected (M, {real.shape[-1]})")
    if min(len(real), len(generated)) < FEWEST_SAMPLES:
        raise ValueError(f"features: got {len(real)} and {len(generated)} samples, expected at least 2 of each")
    first, second = real.double(), generated.double()
    weights = [_with_all(bootstrap, len(values), stream, values) for stream, values in ((1, first), (2, second))]
    distances = (scale * _distances(kernel, first, second, weights[0], weights[1])).cpu().numpy()
    return bootstrap.centred(float(distances[0]), distances[1:], min(len(real), len(generated)))


def kernel_distance(real: Tensor, generated: Tensor, *, kernel: Kernel = cubic_kernel) -> float:
    """The distance alone, without an interval.

    Args:
        real: (N,D), N at least 2.
        generated: (M,D), M at least 2.
        kernel: of two sets of features, (N,M).
    """
    first, second = real.double(), generated.double()
    return float(_distances(kernel, first, second, first.new_ones(1, len(first)), second.new_ones(1, len(second))))


def mean_pairs(pairwise: Tensor, bootstrap: Bootstrap, stream: int = 1) -> tuple[float, np.ndarray]:
    """Mean over all pairs of different samples of a symmetric matrix (N,N), and its replicates (R,).

    Args:
        pairwise: a value for each pair; the diagonal does not count.
        bootstrap: for the replicates.
        stream: of the resampling, as in `Bootstrap.counts`.
    """
    matrix = pairwise.double()
    weights = _with_all(bootstrap, len(matrix), stream, matrix)
    squares = weights.square()
    total = ((weights @ matrix) * weights).sum(1) - squares @ matrix.diagonal()
    means = (total / (weights.sum(1).square() - squares.sum(1))).cpu().numpy()
    return float(means[0]), means[1:]


def _with_all(bootstrap: Bootstrap, samples: int, stream: int, like: Tensor) -> Tensor:
    """(1 + R, N) counts: each sample once, then the resamples."""
    counts = torch.from_numpy(bootstrap.counts(samples, stream)).to(like)
    return torch.cat([torch.ones_like(counts[:1]), counts])


def _distances(kernel: Kernel, first: Tensor, second: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The distance under each row of weights (R,N) and (R,M), whose sums are N and M."""
    within = _pair_mean(kernel, first, left) + _pair_mean(kernel, second, right)
    return within - 2 * _quadratic(kernel, first, second, left, right) / (len(first) * len(second))


def _pair_mean(kernel: Kernel, values: Tensor, weights: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different samples under each row of weights."""
    squares = weights.square()
    diagonal = torch.cat([kernel(row[None], row[None])[0] for row in values])
    total = _quadratic(kernel, values, values, weights, weights) - squares @ diagonal
    return total / (weights.sum(1).square() - squares.sum(1))


def _quadratic(kernel: Kernel, first: Tensor, second: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σᵢⱼ wᵢ k(xᵢ, yⱼ) vⱼ for each row of weights, never holding more than a block of the kernel's matrix."""
    total = torch.zeros_like(left[:, 0])
    for start in range(0, len(first), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        total += ((left[:, part] @ kernel(first[part], second)) * right).sum(1)
    return total
