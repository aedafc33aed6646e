"""Read an image of colored shapes without any learned network: objects, colors, sizes, relations, background.

The image is split into a background and the regions that stand out from it. A region's contrast with the background
is compared with each ideal shape of the same centroid and spread, at several degrees of blur; the best match gives
shape, size and (through its least-squares amplitude) the color, even if no pixel of a small blurred object has its
pure color. H, W: image; h, w: patch, in pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.metrics.shapes_ideal import IdealShape, ideal_shapes

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# 8-bit RGB by color name.
REFERENCE_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 215, 40),
    "green": (40, 160, 70),
    "blue": (40, 70, 210),
    "purple": (150, 50, 190),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
_NAMES = tuple(REFERENCE_COLOURS)
_REFERENCES = np.array(list(REFERENCE_COLOURS.values()), dtype=np.float64)
# Euclidean distances in 8-bit RGB: beyond the first a color has no name, below the second nothing stands out.
MAX_NAMING_DISTANCE = 90.0
MIN_CONTRAST = 45.0
# A pixel belongs to a region if it has this share of the largest contrast within reach (in short sides) of it.
RELATIVE_CONTRAST, CONTRAST_REACH = 0.45, 0.08
MIN_AREA = 0.006  # in squared short sides; the smallest object of the data set covers three times as much


def name_colour(colour: Floats) -> str | None:
    """Return the nearest color name of an RGB triple in [0, 255], or None if none is near."""
    distances = np.linalg.norm(_REFERENCES - colour, axis=1)
    nearest = int(distances.argmin())
    return _NAMES[nearest] if distances[nearest] <= MAX_NAMING_DISTANCE else None


def background_colour(image: Floats) -> Floats:
    """Return the background's RGB: the median over the border pixels with the most frequent nearest color."""
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    nearest = np.linalg.norm(border[:, None] - _REFERENCES, axis=2).argmin(axis=1)
    commonest = np.bincount(nearest, minlength=len(_NAMES)).argmax()
    return np.median(border[nearest == commonest], axis=0)


def find_regions(image: Floats, background: Floats) -> list[Mask]:
    """Return the connected regions (H, W) that stand out from the background, largest first, without specks."""
    contrast = np.linalg.norm(image - background, axis=2)
    short = min(contrast.shape)
    local = largest_within(contrast, max(1, round(CONTRAST_REACH * short)))
    labels, count = connected_components(contrast > np.maximum(MIN_CONTRAST, RELATIVE_CONTRAST * local))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    kept = [label for label in range(1, count + 1) if areas[label] >= MIN_AREA * short * short]
    return [labels == label for label in sorted(kept, key=lambda k: -areas[k])]


def connected_components(mask: Mask) -> tuple[NDArray[np.int64], int]:
    """Label the 4-connected components of a mask (H, W) from 1 upwards; 0 is outside. Returns labels and count."""
    runs = [(row, start, stop) for row in range(mask.shape[0]) for start, stop in _runs(mask[row])]
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0
    for i, (row, start, stop) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= start):
            above += 1
        touching = above
        while runs[touching][0] == row - 1 and runs[touching][1] < stop:
            parent[root(touching)] = root(i)
            touching += 1
    labels = np.zeros(mask.shape, dtype=np.int64)
    numbers: dict[int, int] = {}
    for i, (row, start, stop) in enumerate(runs):
        labels[row, start:stop] = numbers.setdefault(root(i), len(numbers) + 1)
    return labels, len(numbers)


def _runs(row: Mask) -> list[tuple[int, int]]:
    steps = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(steps[::2], steps[1::2], strict=True)]


def largest_within(values: NDArray, reach: int) -> NDArray:
    """Return the largest of the values (H, W) within a square that reaches so far to each side; it dilates masks."""
    for axis in (0, 1):
        padding = [(reach, reach) if a == axis else (0, 0) for a in (0, 1)]
        padded = np.pad(values, padding, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=axis)
        values = windows.max(axis=-1)
    return values


MIN_SIDE_PX = 32
# Larger images are downsampled by an integer factor to at least this short side.
WORKING_SIDE_PX = 64
# Smallest longer side of a large object's box, in short sides of the image: alone in it, and among others.
LARGE_FROM_ALONE, LARGE_FROM_AMONG = 0.50, 0.36
MAX_OBJECTS = 6
BLURS_PX = (0.0, 0.7, 1.1, 1.6)
# Share of a region's energy that the best shape leaves unexplained; above this the shape has no name.
MAX_MISFIT = 0.15
SURROUND_PX = 2


@dataclass(frozen=True)
class ReadObject:
    """One object as read; its color or shape is None if it is like none of the known ones.

    Attributes:
        colour, shape, size: names; size is "small" or "large".
        centre: (x, y) of its box's center as fractions of the image's width and height.
        box: (left, top, right, bottom) in the same fractions.
        misfit: share of the region's energy that the shape leaves unexplained, 0 to 1.
    """

    colour: str | None
    shape: str | None
    size: str
    centre: tuple[float, float]
    box: tuple[float, float, float, float]
    misfit: float


@dataclass(frozen=True)
class Reading:
    """An image as read; its objects are sorted by the area of their regions, largest first."""

    objects: tuple[ReadObject, ...]
    background: str | None
    width: int
    height: int

    def relation(self, subject: int, reference: int) -> str:
        """Return where one object is relative to another, along the axis on which their centers differ more."""
        one, other = self.objects[subject].centre, self.objects[reference].centre
        right, down = (one[0] - other[0]) * self.width, (one[1] - other[1]) * self.height
        if abs(right) > abs(down):
            return "right of" if right > 0 else "left of"
        return "below" if down > 0 else "above"


def read_shapes(image: NDArray[np.uint8]) -> Reading:
    """Read an RGB image, uint8 (H, W, 3). Raises ValueError: wrong shape or type, or a side below 32 pixels."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}; expected uint8 (H, W, 3)")
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE_PX:
        raise ValueError(f"image is {height}×{width}; expected at least {MIN_SIDE_PX} pixels a side")
    reduced, factor = _reduce(image)
    background = background_colour(reduced)
    regions = find_regions(reduced, background)[:MAX_OBJECTS]
    taken = np.zeros(reduced.shape[:2], dtype=bool)
    for region in regions:
        taken |= region
    large_px = min(height, width) * (LARGE_FROM_ALONE if len(regions) == 1 else LARGE_FROM_AMONG)
    contrast, size = reduced - background, (width, height)
    objects = [_read_object(contrast, background, one, taken, factor, size, large_px) for one in regions]
    return Reading(tuple(objects), name_colour(background), width, height)


@dataclass(frozen=True)
class _Match:
    """The best ideal shape for a patch: its scale and centroid in pixels of the patch, its amplitude and its misfit."""

    shape: IdealShape
    scale: float
    centroid: tuple[float, float]
    amplitude: float
    misfit: float


def _reduce(image: NDArray[np.uint8]) -> tuple[Floats, int]:
    height, width = image.shape[:2]
    factor = max(1, min(height, width) // WORKING_SIDE_PX)
    rows, columns = height // factor, width // factor
    trimmed = image[: rows * factor, : columns * factor].astype(np.float64)
    return trimmed.reshape(rows, factor, columns, factor, 3).mean(axis=(1, 3)), factor


def _read_object(
    contrast: Floats,
    background: Floats,
    region: Mask,
    taken: Mask,
    factor: int,
    size: tuple[int, int],
    large_px: float,
) -> ReadObject:
    near = largest_within(region, SURROUND_PX) & ~largest_within(taken & ~region, 1)
    rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    direction = contrast[region].sum(axis=0)
    direction /= np.linalg.norm(direction)
    match = _best_match(contrast[window] @ direction, near[window])
    left, top = (
        place + corner - middle * match.scale
        for place, corner, middle in zip(match.centroid, (columns[0], rows[0]), match.shape.centroid, strict=True)
    )
    edges = [((left, top) * 2)[i] + edge * match.scale for i, edge in enumerate(match.shape.box)]
    box = tuple(float(edge * factor / (size * 2)[i]) for i, edge in enumerate(edges))
    return ReadObject(
        name_colour(background + match.amplitude * direction),
        match.shape.name if match.misfit <= MAX_MISFIT else None,
        "large" if match.scale * factor >= large_px else "small",
        ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
        (box[0], box[1], box[2], box[3]),
        match.misfit,
    )


def _best_match(values: Floats, weights: Mask) -> _Match:
    """Match a patch (h, w), where `weights` is true, with every ideal shape at every blur."""
    seen = np.where(weights, values, 0)
    mass = seen.sum()
    y, x = np.indices(seen.shape) + 0.5
    centroid = (float((seen * x).sum() / mass), float((seen * y).sum() / mass))
    spread = float((seen * ((x - centroid[0]) ** 2 + (y - centroid[1]) ** 2)).sum() / mass)
    matches = [_match(seen, weights, shape, centroid, spread, blur) for blur in BLURS_PX for shape in ideal_shapes()]
    return min(matches, key=lambda match: match.misfit)


def _match(
    seen: Floats, weights: Mask, shape: IdealShape, centroid: tuple[float, float], spread: float, blur: float
) -> _Match:
    # A pixel's own width adds 1/12 to the spread along each axis, a Gaussian its variance.
    scale = float(np.sqrt(max(spread - 2 * blur**2 - 1 / 6, 1.0) / shape.spread))
    ideal = shape.cover(seen.shape, centroid, scale)
    if blur:
        ideal = _blur_matrix(seen.shape[0], blur) @ ideal @ _blur_matrix(seen.shape[1], blur)
    ideal = np.where(weights, ideal, 0)
    overlap, energy = float((seen * ideal).sum()), float((ideal**2).sum()) + 1e-12
    return _Match(shape, scale, centroid, overlap / energy, 1 - overlap**2 / (energy * float((seen**2).sum())))


def _blur_matrix(length: int, deviation: float) -> Floats:
    offsets = np.arange(length)[:, None] - np.arange(length)[None, :]
    kernel = np.exp(-(offsets**2) / (2 * deviation**2))
    return kernel / np.exp(-(np.arange(-9, 10) ** 2) / (2 * deviation**2)).sum()
