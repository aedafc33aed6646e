"""Distances between sets of features: kernel distance, Fréchet distance, diversity, each with an interval.

Shapes: features (N,D) and (M,D); R resamples; mean (D,); covariance (D,D); P prompts, S seeds. Computed in float64.

*Kernel distance*: squared maximum mean discrepancy, unbiased. With the cubic kernel this is KID (arXiv 1801.01401,
section 4); with the Gaussian kernel on unit-length CLIP features, CMMD (arXiv 2401.09603, section 4). Values at
different counts are comparable; a value below zero is chance.

*Fréchet distance*: each set is modeled as a Gaussian (arXiv 1706.08500, equation 6). The value rises as sets get
smaller, by an amount that depends on the features: compare it only at equal counts and for the same network
(arXiv 1911.07023).

*Diversity*: how different images of one prompt are, as a share of how different real images are.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hdm_lightning.metrics.bootstrap import Bootstrap, Estimate, Rows

Kernel = Callable[[Tensor, Tensor], Tensor]

FEWEST_SAMPLES = 2
CMMD_BANDWIDTH = 10.0
CMMD_SCALE = 1000.0
_BLOCK_ROWS = 1024
_POSITIVE = (0.0, float("inf"))
_NO_INTERVAL = Bootstrap(resamples=2)


def cubic_kernel(first: Tensor, second: Tensor) -> Tensor:
    """Return (x·y / D + 1)³ of each pair, (N,M)."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def gaussian_kernel(first: Tensor, second: Tensor, *, bandwidth: float = CMMD_BANDWIDTH) -> Tensor:
    """Return exp(−‖x − y‖² / 2σ²) of each pair, (N,M)."""
    return torch.exp(-torch.cdist(first, second).square() / (2 * bandwidth**2))


def euclidean_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return distances between rows of (N,D) and (M,D), (N,M), finite everywhere and exactly zero between equal rows.

    The fast formula with inner products takes the root of a difference that rounding can make negative: NaN for equal
    images, which are common in web data.
    """
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def kernel_distance_estimate(
    real: Tensor,
    generated: Tensor,
    bootstrap: Bootstrap,
    *,
    kernel: Kernel = cubic_kernel,
    scale: float = 1.0,
    matched: bool = False,
) -> Estimate:
    """Estimate the kernel distance of (N,D) and (M,D), with a centered percentile interval over samples of both.

    All pairs count, not averages over small subsets. Pairs of a sample with itself, which resampling makes, are left
    out of the replicates as they are of the value.

    Args:
        kernel: kernel of two sets of features, (N,M).
        scale: factor of the result.
        matched: generated image i has the caption of real image i. Such a pair is more alike than two of different
            captions and would make the distance too small, so it is left out, and captions are resampled.

    Raises:
        ValueError: the shapes do not match, or a set has fewer than two samples.
    """
    _require_fit(real, generated, FEWEST_SAMPLES)
    if matched and len(real) != len(generated):
        raise ValueError(f"generated: got {len(generated)} samples, expected {len(real)}, one per caption")
    first, second = real.double(), generated.double()
    streams = ((1, first), (1 if matched else 2, second))
    weights = [_with_all(bootstrap, len(values), stream, values) for stream, values in streams]
    found = _kernel_distances(kernel, first, second, weights[0], weights[1], matched=matched)
    distances = (scale * found).cpu().numpy()
    return bootstrap.centred(float(distances[0]), distances[1:], min(len(real), len(generated)))


def kernel_floor(
    real: Tensor, generated: int, bootstrap: Bootstrap, *, kernel: Kernel = cubic_kernel, scale: float = 1.0
) -> Estimate:
    """Estimate the kernel distance of images from the reference's own distribution: its resamples against each other.

    `generated` is M, the size of the set that is compared with the reference (N,D).
    """
    values = real.double()
    counts = [bootstrap.counts(len(real), stream, size) for stream, size in ((3, len(real)), (4, generated))]
    left, right = (torch.from_numpy(each).to(values) for each in counts)
    diagonal = _of_pairs(kernel, values, values)
    within = [
        (_quadratic(kernel, values, values, weights, weights) - weights @ diagonal) / (size * (size - 1))
        for weights, size in ((left, len(real)), (right, generated))
    ]
    across = _quadratic(kernel, values, values, left, right) / (len(real) * generated)
    return bootstrap.of_floor((scale * (within[0] + within[1] - 2 * across)).cpu().numpy(), len(real))


def kernel_contributions(real: Tensor, generated: Tensor, *, matched: bool = False) -> Tensor:
    """Return what each generated image (M,D) adds to the cubic kernel distance from (N,D), (M,), which is their mean.

    Their spread is that of the distance over other generated images (its influence function), so two models on the
    same prompts can be compared image by image, for these reference images. `matched` as for the distance.
    """
    kernel, first, second = cubic_kernel, real.double(), generated.double()
    within_real = _pair_mean(kernel, first, first.new_ones(1, len(first)))
    own, to_real = [], []
    for part in second.split(_BLOCK_ROWS):
        own.append(kernel(part, second).sum(1))
        to_real.append(kernel(part, first).mean(1))
    among, across = (torch.cat(own) - _of_pairs(kernel, second, second)) / (len(second) - 1), torch.cat(to_real)
    if matched:
        across = (across * len(first) - _of_pairs(kernel, first, second)) / (len(first) - 1)
    return within_real + 2 * (among - across) - among.mean()


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """Return the kernel distance (cubic kernel) of (N,D) and (M,D) without an interval; both counts at least 2."""
    first, second = real.double(), generated.double()
    once = first.new_ones(1, len(first)), second.new_ones(1, len(second))
    return float(_kernel_distances(cubic_kernel, first, second, *once))


def mean_pairs(pairwise: Tensor, bootstrap: Bootstrap, stream: int = 1) -> tuple[float, np.ndarray]:
    """Return the mean over all pairs of different samples of a symmetric matrix (N,N), and its replicates (R,)."""
    matrix = pairwise.double()
    weights = _with_all(bootstrap, len(matrix), stream, matrix)
    squares = weights.square()
    total = ((weights @ matrix) * weights).sum(1) - squares @ matrix.diagonal()
    means = (total / (weights.sum(1).square() - squares.sum(1))).cpu().numpy()
    return float(means[0]), means[1:]


def diversity_estimates(by_prompt: Tensor, real: Tensor, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Estimate the diversity of images of P prompts with S seeds each.

    Args:
        by_prompt: features (P,S,D), at least two prompts of two seeds.
        real: features (N,D) of at least two real images.
        bootstrap: resamples prompts, and real images.

    Returns:
        `within` and `across`: mean distances of images of one prompt and of different prompts, in units of `real`,
        the mean distance of real images.

    Raises:
        ValueError: there is no pair to compare, or all real images are equal.
    """
    if by_prompt.dim() != 3 or min(by_prompt.shape[:2]) < 2 or len(real) < 2:
        shapes = f"{tuple(by_prompt.shape)}, {tuple(real.shape)}"
        raise ValueError(f"by_prompt, real: got shapes {shapes}, expected (P ≥ 2, S ≥ 2, D), (N ≥ 2, D)")
    prompts, seeds = by_prompt.shape[:2]
    scale, scales = mean_pairs(_to_each_other(real), bootstrap, stream=2)
    if not scale:
        raise ValueError("real: all images are equal, expected different ones, as their mean distance is the unit")
    units = np.where(scales > 0, scales, np.nan)  # with few images, a resample can have only equal ones
    per_prompt = np.array([mean_pairs(_to_each_other(of_one), _NO_INTERVAL)[0] for of_one in by_prompt])
    within = bootstrap.counts(prompts) @ per_prompt / prompts
    # Images of one seed, one per prompt, differ only in their prompt; the mean over seeds uses every image.
    across = [mean_pairs(_to_each_other(by_prompt[:, seed]), bootstrap) for seed in range(seeds)]
    value, replicates = np.mean([one for one, _ in across]), np.mean([many for _, many in across], axis=0)
    return {
        "within": bootstrap.centred(float(per_prompt.mean()) / scale, within / units, prompts, bounds=_POSITIVE),
        "across": bootstrap.centred(float(value) / scale, replicates / units, prompts, bounds=_POSITIVE),
        "real": bootstrap.centred(scale, scales, len(real), bounds=_POSITIVE),
    }


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2(C₁C₂)^½) of two Gaussians, each given by mean (D,) and covariance (D,D).

    The trace of the root equals that of (C₁^½ C₂ C₁^½)^½, which is symmetric, so its eigenvalues are real.
    """
    (mean_one, cov_one), (mean_two, cov_two) = first, second
    values, vectors = torch.linalg.eigh(cov_one.double())
    root = vectors * values.clamp(min=0).sqrt()
    inner = torch.linalg.eigvalsh(root.T @ cov_two.double() @ root)
    offset = (mean_one.double() - mean_two.double()).square().sum()
    spread = cov_one.double().trace() + cov_two.double().trace() - 2 * inner.clamp(min=0).sqrt().sum()
    return float(offset + spread)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and unbiased covariance (D,D) of features (N,D), in float64."""
    values = features.double()
    return values.mean(0), torch.cov(values.T).reshape(values.shape[1], values.shape[1])


def frechet_needs(width: int) -> int:
    """Return the samples that each set of D features needs: with fewer, its covariance does not have full rank."""
    return width + 1


def frechet_estimate(real: Tensor, generated: Tensor, bootstrap: Bootstrap, *, paired: bool = False) -> Estimate:
    """Estimate the Fréchet distance of (N,D) and (M,D), with a centered percentile interval over samples of both.

    Args:
        bootstrap: every resample costs two eigenvalue problems of size D.
        paired: row i of one set was made from row i of the other, such as a reconstruction from its image. Chance
            properties of the images are then in both sets, and count for less than between sets of different images.

    Raises:
        ValueError: a set has too few samples for its covariance.
    """
    _require_fit(real, generated, frechet_needs(real.shape[-1]))
    first, second = real.double(), generated.double()

    def distance(one: Rows, other: Rows) -> float:
        rows = (torch.from_numpy(one).to(first.device), torch.from_numpy(other).to(second.device))
        return frechet_distance(moments(first[rows[0]]), moments(second[rows[1]]))

    return bootstrap.sets(distance, len(real), len(generated), bounds=_POSITIVE, paired=paired)


def frechet_floor(real: Tensor, generated: int, bootstrap: Bootstrap) -> Estimate:
    """Estimate the Fréchet distance of images from the reference's own distribution: the part that is bias.

    `generated` is M, the size of the set that is compared with the reference (N,D).
    """
    values = real.double()
    rows = zip(bootstrap.rows(len(real), 3), bootstrap.rows(len(real), 4, generated), strict=True)
    found = [frechet_distance(*(moments(values[torch.from_numpy(each)]) for each in pair)) for pair in rows]
    return bootstrap.of_floor(np.array(found), len(real))


def _require_fit(real: Tensor, generated: Tensor, needed: int) -> None:
    if real.dim() != 2 or real.shape[1:] != generated.shape[1:]:
        raise ValueError(f"generated: got shape {tuple(generated.shape)}, expected (M, {real.shape[-1]})")
    fewest = min(len(real), len(generated))
    if fewest < needed:
        raise ValueError(f"features: got {fewest} samples of {real.shape[1]} features, expected at least {needed}")


def _with_all(bootstrap: Bootstrap, samples: int, stream: int, like: Tensor) -> Tensor:
    """Return counts (1 + R, N): each sample once, then the resamples."""
    counts = torch.from_numpy(bootstrap.counts(samples, stream)).to(like)
    return torch.cat([torch.ones_like(counts[:1]), counts])


def _kernel_distances(
    kernel: Kernel, first: Tensor, second: Tensor, left: Tensor, right: Tensor, *, matched: bool = False
) -> Tensor:
    """Return the distance for each row of weights (R,N) and (R,M), which sum to N and M; `matched`: no pairs (i, i)."""
    within = _pair_mean(kernel, first, left) + _pair_mean(kernel, second, right)
    total, pairs = _quadratic(kernel, first, second, left, right), left.sum(1) * right.sum(1)
    if matched:
        both = left * right
        total -= both @ _of_pairs(kernel, first, second)
        pairs -= both.sum(1)
    return within - 2 * total / pairs


def _pair_mean(kernel: Kernel, values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of the kernel over pairs of different samples for each row of weights."""
    squares = weights.square()
    total = _quadratic(kernel, values, values, weights, weights) - squares @ _of_pairs(kernel, values, values)
    return total / (weights.sum(1).square() - squares.sum(1))


def _of_pairs(kernel: Kernel, first: Tensor, second: Tensor) -> Tensor:
    """Return the kernel of each row of (N,D) with the same row of the other set, (N,)."""
    return torch.cat([kernel(x[None], y[None])[0] for x, y in zip(first, second, strict=True)])


def _quadratic(kernel: Kernel, first: Tensor, second: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return Σᵢⱼ wᵢ k(xᵢ, yⱼ) vⱼ for each row of weights, with only a block of the kernel's matrix in memory."""
    total = torch.zeros_like(left[:, 0])
    for start in range(0, len(first), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        total += ((left[:, part] @ kernel(first[part], second)) * right).sum(1)
    return total


def _to_each_other(features: Tensor) -> Tensor:
    values = features.double()
    return euclidean_distances(values, values)
