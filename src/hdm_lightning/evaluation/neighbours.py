"""Precision, recall, density and coverage of generated features by their nearest neighbours among real ones.

Shapes: features (N,D) real and (M,D) generated.

Each sample's neighbourhood is the ball to its k-th nearest other sample of the same set. Precision and recall
(arXiv 1904.06991): share of generated samples in some real ball, and of real samples in some generated ball.
Density and coverage (arXiv 2002.09797, equations 4 and 5): real balls that a generated sample lies in, over k; share of
real balls that hold a generated sample. Precision and density speak of quality, recall and coverage of variety.
"""

import torch
from torch import Tensor

from hdm_lightning.evaluation.bootstrap import Bootstrap, Estimate

MEASURES = ("precision", "recall", "density", "coverage")
NEIGHBOURS = 5
MOST_SAMPLES = 5000
"""Samples of each set that are used: the distance matrices of more would not fit, and change little."""


def neighbour_statistics(
    within_real: Tensor, within_generated: Tensor, across: Tensor, neighbours: int = NEIGHBOURS
) -> Tensor:
    """Precision, recall, density and coverage, (4,).

    Args:
        within_real: distances of real samples to each other, (N,N), zero on the diagonal.
        within_generated: likewise (M,M).
        across: (N,M).
        neighbours: k, below N and M.

    Raises:
        ValueError: a set has no k-th neighbour.
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
    """The four measures of two sets with centred percentile intervals over samples of both.

    Args:
        real: (N,D); the first `MOST_SAMPLES` count.
        generated: (M,D); likewise.
        bootstrap: every resample gathers three distance matrices.
        neighbours: k.
    """
    first, second = real[:MOST_SAMPLES].float(), generated[:MOST_SAMPLES].float()
    within_real, within_generated = euclidean_distances(first, first), euclidean_distances(second, second)
    matrices = (within_real, within_generated, euclidean_distances(first, second))
    value = neighbour_statistics(*matrices, neighbours)
    replicates = []
    pairs = zip(bootstrap.rows(len(first), stream=1), bootstrap.rows(len(second), stream=2), strict=True)
    for one, other in pairs:
        i, j = (torch.from_numpy(rows).to(first.device) for rows in (one, other))
        resampled = (matrices[0][i][:, i], matrices[1][j][:, j], matrices[2][i][:, j])
        replicates.append(neighbour_statistics(*resampled, neighbours))
    table = torch.stack(replicates).cpu().numpy()
    tops = {"density": float("inf")}
    return {
        name: bootstrap.centred(
            float(value[column]),
            table[:, column],
            min(len(first), len(second)),
            bounds=(0.0, tops.get(name, 1.0)),
        )
        for column, name in enumerate(MEASURES)
    }


def _radius(within: Tensor, neighbours: int, name: str) -> Tensor:
    """Distance to the k-th nearest other sample of each, (N,); the nearest of all is the sample itself."""
    if len(within) <= neighbours:
        raise ValueError(f"{name}: got {len(within)} samples, expected more than the {neighbours} neighbours")
    return within.kthvalue(neighbours + 1, dim=1).values


def euclidean_distances(first: Tensor, second: Tensor) -> Tensor:
    """Distance of each row of (N,D) to each of (M,D), (N,M), finite everywhere and exactly zero between equal rows.

    The quick formula by inner products takes the root of a difference that rounding can make negative: NaN for equal
    pictures, of which data from the web are full.
    """
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
