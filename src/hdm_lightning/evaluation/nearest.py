"""Nearest training pictures of generated ones, against those of real pictures that were held out.

Shapes: features (M,D) generated, (N,D) training, (K,D) held out; thumbnails (B,3,h,w), uint8.

A model that copies draws pictures that lie nearer to their nearest training picture than unseen real pictures do
(as in arXiv 2301.13188, which looks at pixels; features see copies that were moved or recoloured too).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hdm_lightning.evaluation.bootstrap import Bootstrap, Estimate, Rows

CLOSE_SHARE = 0.05
_BLOCK_ROWS = 512


@dataclass(frozen=True)
class Nearest:
    """The nearest of a set for each query: Euclidean distance (M,) and row (M,)."""

    distance: Tensor
    row: Tensor


def nearest(queries: Tensor, among: Tensor, *, query_keys: Sequence[str] = (), keys: Sequence[str] = ()) -> Nearest:
    """The nearest row of `among` for each query, but not the query's own.

    Args:
        queries: (M,D).
        among: (N,D).
        query_keys, keys: names of the rows; a row with a query's own name does not count. Give both or none.

    Raises:
        ValueError: nothing is left to be nearest.
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
            raise ValueError("among: a query has nothing but itself to be near to, expected other rows")
        # The search goes by inner products, which give equal rows a distance of their rounding: computed again exactly.
        distances.append(torch.linalg.vector_norm(part - among[found.indices].double(), dim=1))
        rows.append(found.indices)
    return Nearest(torch.cat(distances), torch.cat(rows))


def closeness_estimates(generated: Tensor, heldout: Tensor, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """How near generated pictures lie to the training set, compared with held-out real ones.

    Args:
        generated: distances (M,) to the nearest training picture.
        heldout: the same (K,) of real pictures.
        bootstrap: resamples both.

    Returns:
        `ratio`: of the medians, below 1 where generated pictures lie nearer. `closer`: the share of generated pictures
        nearer than 95% of the held-out ones are; 5% is expected without copying. There is no `ratio` where half of the
        held-out pictures equal a training picture, so that their median is zero.
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


def pixel_rmse(first: Tensor, second: Tensor) -> Tensor:
    """Root mean squared difference in grey levels of [0, 255], (B,), of uint8 pictures of equal shape."""
    return (first.float() - second.float()).square().flatten(1).mean(1).sqrt()
