"""Ideal shapes that the reader compares with, and their coverage of a pixel grid. h, w: patch in pixels.

Each shape is an inside test in a frame where y points down and the longer side of its bounding box is 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
GRID = 120


@dataclass(frozen=True)
class IdealShape:
    """A shape rasterized once on a fine grid.

    Attributes:
        cumulative: area above and to the left of each corner of the grid over the unit box, (GRID + 1, GRID + 1).
        centroid: center of mass (x, y) in the frame.
        spread: mean squared distance of its points from the centroid.
        box: bounding box (left, top, right, bottom) in the frame.
    """

    name: str
    cumulative: Floats
    centroid: tuple[float, float]
    spread: float
    box: tuple[float, float, float, float]

    def cover(self, shape: tuple[int, int], centre: tuple[float, float], scale: float) -> Floats:
        """Return how much of each pixel (h, w) the shape covers, centroid at (x, y) and `scale` px per unit."""
        rows = _corner_weights(shape[0], centre[1] - self.centroid[1] * scale, scale)
        columns = _corner_weights(shape[1], centre[0] - self.centroid[0] * scale, scale)
        return rows @ self.cumulative @ columns.T * scale * scale


@cache
def ideal_shapes() -> tuple[IdealShape, ...]:
    """Return every shape that the reader knows."""
    axis = (np.arange(GRID) + 0.5) / GRID - 0.5
    x, y = axis[None, :] + 0 * axis[:, None], axis[:, None] + 0 * axis[None, :]
    return tuple(_rasterise(name, inside(x, y), axis) for name, inside in INSIDE_TESTS.items())


def _rasterise(name: str, mask: Mask, axis: Floats) -> IdealShape:
    cumulative = np.zeros((GRID + 1, GRID + 1))
    cumulative[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1) / GRID**2
    rows, columns = np.nonzero(mask)
    x, y = axis[columns], axis[rows]
    half = 0.5 / GRID
    box = (x.min() - half, y.min() - half, x.max() + half, y.max() + half)
    return IdealShape(
        name,
        cumulative,
        (float(x.mean()), float(y.mean())),
        float(x.var() + y.var()),
        (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
    )


def _corner_weights(pixels: int, origin: float, scale: float) -> Floats:
    """Return the (pixels, GRID + 1) matrix that takes cumulative areas at grid corners to pixel differences."""
    places = np.clip(((np.arange(pixels + 1) - origin) / scale + 0.5) * GRID, 0, GRID)
    lower = np.minimum(places.astype(np.int64), GRID - 1)
    weights = np.zeros((pixels + 1, GRID + 1))
    index = np.arange(pixels + 1)
    weights[index, lower] = 1 - (places - lower)
    weights[index, lower + 1] += places - lower
    return np.diff(weights, axis=0)


def _triangle(x: Floats, y: Floats) -> Mask:
    height = math.sqrt(3) / 2
    return (y <= height / 2) & (2 * height * np.abs(x) <= y + height / 2)


def _star(x: Floats, y: Floats) -> Mask:
    # The five lines of a pentagram with circumradius R are R·cos 72° from its center, each opposite a tip;
    # a point is in the star if it is beyond at most one of them.
    radius = 0.5 / math.sin(math.radians(72))
    y = y - radius * (1 - math.cos(math.radians(36))) / 2
    angles = np.radians(-90 + 72 * np.arange(5))[:, None, None]
    beyond = x * np.cos(angles) + y * np.sin(angles) > radius * math.cos(math.radians(72))
    return beyond.sum(axis=0) <= 1


def _heart(x: Floats, y: Floats) -> Mask:
    # A square standing on its corner, plus two disks whose diameters are its upper edges.
    radius = 1 / (2 + math.sqrt(2))
    offset = radius / math.sqrt(2)
    top, bottom = -offset - radius, 2 * offset
    y = y + (top + bottom) / 2
    x = np.abs(x)
    return ((x - offset) ** 2 + (y + offset) ** 2 <= radius**2) | (x + np.abs(y) <= 2 * offset)


INSIDE_TESTS: dict[str, Callable[[Floats, Floats], Mask]] = {
    "circle": lambda x, y: x**2 + y**2 <= 0.25,
    "square": lambda x, y: (np.abs(x) <= 0.5) & (np.abs(y) <= 0.5),
    "triangle": _triangle,
    "star": _star,
    "cross": lambda x, y: np.minimum(np.abs(x), np.abs(y)) <= 1 / 6,
    "ring": lambda x, y: (x**2 + y**2 <= 0.25) & (x**2 + y**2 >= 0.28**2),
    "heart": _heart,
    "diamond": lambda x, y: np.abs(x) / 0.375 + np.abs(y) / 0.5 <= 1,
}
