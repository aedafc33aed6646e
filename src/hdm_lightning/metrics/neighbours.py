"""Nearest neighbors of features: precision, recall, density and coverage, and how close images are to training images.

Shapes: features (N,D) real or training, (M,D) generated, (K,D) held out; images (B,3,h,w), uint8.

*Neighborhoods*: a sample's neighborhood is the ball that reaches to its k-th nearest other sample of the same set.
Precision and recall (arXiv 1904.06991): share of generated samples in some real ball, and of real samples in some
generated ball. Density and coverage (arXiv 2002.09797, equations 4 and 5): mean number of real balls that contain a
generated sample, over k; share of real balls that contain one. Precision and density measure quality, recall and
coverage variety.

*Copies*: a model that copies generates images that are closer to their nearest training image than unseen real images
are (as in arXiv 2301.13188, which compares pixels; features also reveal copies that were moved or recolored).
Generated images come out of an autoencoder, whose artifacts would hide any copy, so the images that they are compared
with must go through it as well. Planted copies show how much the search can find.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hdm_lightning.metrics.bootstrap import Bootstrap, Estimate, Rows
from hdm_lightning.metrics.distances import euclidean_distances

NEIGHBOURS = 5
MOST_SAMPLES = 5000
"""Samples used of each set: distance matrices of more would not fit in memory, and would change little."""

CLOSE_SHARE = 0.05
_BLOCK_ROWS = 512
# Bounds of each measure, in order of computation.
_BOUNDS = {"precision": (0.0, 1.0), "recall": (0.0, 1.0), "density": (0.0, float("inf")), "coverage": (0.0, 1.0)}


def neighbour_statistics(
    within_real: Tensor, within_generated: Tensor, across: Tensor, neighbours: int = NEIGHBOURS
) -> Tensor:
    """Return precision, recall, density and coverage, (4,).

    Args:
        within_real, within_generated: distances in each set, (N,N) and (M,M), zero on the diagonal.
        across: distances between real and generated samples, (N,M).
        neighbours: k, below N and M.

    Raises:
        ValueError: a set is too small to have a k-th neighbor.
    """
    real_ball = _radius(within_real, neighbours, "within_real")
    generated_ball = _radius(within_generated, neighbours, "within_generated")
    inside = across <= real_ball[:, None]
    precision = inside.any(0).double().mean()
    recall = (across <= generated_ball[None, :]).any(1).double().mean()
    density = inside.double().sum(0).mean() / neighbours
    coverage = (across.min(1).values <= real_ball).double().mean()
    return torch.stack([precision, recall, density, coverage])


def neighbour_estimates(
    real: Tensor, generated: Tensor, bootstrap: Bootstrap, neighbours: int = NEIGHBOURS
) -> dict[str, Estimate]:
    """Estimate the four measures for the first `MOST_SAMPLES` of (N,D) and (M,D), with centered intervals."""
    first, second = real[:MOST_SAMPLES].float(), generated[:MOST_SAMPLES].float()
    within_real, within_generated = euclidean_distances(first, first), euclidean_distances(second, second)
    across = euclidean_distances(first, second)
    value = neighbour_statistics(within_real, within_generated, across, neighbours)
    replicates = []
    pairs = zip(bootstrap.rows(len(first), stream=1), bootstrap.rows(len(second), stream=2), strict=True)
    for one, other in pairs:
        i, j = (torch.from_numpy(rows).to(first.device) for rows in (one, other))
        resampled = within_real[i][:, i], within_generated[j][:, j], across[i][:, j]
        replicates.append(neighbour_statistics(*resampled, neighbours))
    columns, fewest = torch.stack(replicates).cpu().numpy().T, min(len(first), len(second))
    return {
        name: bootstrap.centred(float(value[row]), columns[row], fewest, bounds=bounds)
        for row, (name, bounds) in enumerate(_BOUNDS.items())
    }


def _radius(within: Tensor, neighbours: int, name: str) -> Tensor:
    """Return the distance from each sample to its k-th nearest other one, (N,); the nearest is the sample itself."""
    if len(within) <= neighbours:
        raise ValueError(f"{name}: got {len(within)} samples, expected more than the {neighbours} neighbors")
    return within.kthvalue(neighbours + 1, dim=1).values


@dataclass(frozen=True)
class Nearest:
    """The nearest row of a set for each query: Euclidean distance (M,) and row number (M,)."""

    distance: Tensor
    row: Tensor


def nearest(queries: Tensor, among: Tensor, *, query_keys: Sequence[str] = (), keys: Sequence[str] = ()) -> Nearest:
    """Find the nearest row of `among` for each query, the query's own row excluded.

    Args:
        queries: (M,D).
        among: (N,D).
        query_keys, keys: names of the rows; a row with the query's own name is skipped. Pass both or neither.

    Raises:
        ValueError: a query has no row left to compare with.
    """
    own: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        own.setdefault(key, []).append(row)
    distances, rows = [], []
    for start in range(0, len(queries), _BLOCK_ROWS):
        part = queries[start : start + _BLOCK_ROWS].double()
        block = torch.cdist(part, among.double())
        for row, key in enumerate(query_keys[start : start + _BLOCK_ROWS]):
            block[row, own.get(key, [])] = float("inf")
        found = block.min(1)
        if found.values.isinf().any():
            raise ValueError("among: a query has no row to compare with but itself, expected other rows")
        # cdist uses inner products, whose rounding gives equal rows a distance above 0: recompute it exactly.
        distances.append(torch.linalg.vector_norm(part - among[found.indices].double(), dim=1))
        rows.append(found.indices)
    return Nearest(torch.cat(distances), torch.cat(rows))


def closeness_estimates(generated: Tensor, heldout: Tensor, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Estimate how close generated images (M,) are to the training set, compared with held-out real ones (K,).

    Both are given by the distances to their nearest training image.

    Returns:
        `ratio`: ratio of the medians, below 1 if generated images are closer. `closer`: share of generated images that
        are closer than 95% of the held-out ones; 5% is expected without copying. `ratio` is missing if half of the
        held-out images equal a training image, since their median is then zero.
    """
    first, second = (values.cpu().double().numpy() for values in (generated, heldout))

    def ratio(one: Rows, other: Rows) -> float:
        unit = np.median(second[other])
        return float(np.median(first[one]) / unit) if unit else float("nan")

    def closer(one: Rows, other: Rows) -> float:
        return float((first[one] < np.quantile(second[other], CLOSE_SHARE)).mean())

    sizes = len(first), len(second)
    found = {"closer": bootstrap.sets(closer, *sizes, bounds=(0.0, 1.0))}
    if np.median(second):
        found["ratio"] = bootstrap.sets(ratio, *sizes, bounds=(0.0, float("inf")))
    return found


def found_planted(planted: Nearest, sources: Sequence[int], heldout: Tensor) -> Tensor:
    """Return which planted copies are found, (P,): nearest to their own source, and closer than 95% of held-out images.

    `sources` are the rows of the training images that the copies were made from, `heldout` (K,) distances to training.
    """
    threshold = torch.quantile(heldout.double(), CLOSE_SHARE)
    return (planted.row.cpu() == torch.tensor(sources)) & (planted.distance.cpu() < threshold.cpu())


def pixel_rmse(first: Tensor, second: Tensor) -> Tensor:
    """Return the root mean squared difference in gray levels of [0, 255], (B,), of uint8 images of equal shape."""
    return (first.float() - second.float()).square().flatten(1).mean(1).sqrt()
