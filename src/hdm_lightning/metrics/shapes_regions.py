"""Parts an image into a background and the regions that stand out from it. H, W: image in pixels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Colour names and the 8-bit RGB that each stands for.
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
# Euclidean distances in 8-bit RGB: beyond the first a colour has no name, below the second nothing stands out.
MAX_NAMING_DISTANCE = 90.0
MIN_CONTRAST = 45.0
# A pixel belongs to a region when it has this part of the contrast found within reach (in short sides) of it.
RELATIVE_CONTRAST, CONTRAST_REACH = 0.45, 0.08
MIN_AREA = 0.006  # in squared short sides; the smallest object of the set covers three times as much


@dataclass(frozen=True)
class Region:
    """A connected region; `mask` is (H, W) and `area` its pixels."""

    mask: Mask
    area: int


def name_colour(colour: Floats) -> str | None:
    """Return the nearest colour name of an RGB triple in [0, 255], or None when none is near."""
    distances = np.linalg.norm(_REFERENCES - colour, axis=1)
    nearest = int(distances.argmin())
    return _NAMES[nearest] if distances[nearest] <= MAX_NAMING_DISTANCE else None


def background_colour(image: Floats) -> Floats:
    """Return the background's RGB: the median of the border's pixels of its most frequent colour name."""
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    nearest = np.linalg.norm(border[:, None] - _REFERENCES, axis=2).argmin(axis=1)
    commonest = np.bincount(nearest, minlength=len(_NAMES)).argmax()
    return np.median(border[nearest == commonest], axis=0)


def find_regions(image: Floats, background: Floats) -> list[Region]:
    """Return the regions that stand out from the background, largest first; specks are left out."""
    contrast = np.linalg.norm(image - background, axis=2)
    short = min(contrast.shape)
    local = _largest_within(contrast, max(1, round(CONTRAST_REACH * short)))
    labels, count = connected_components(contrast > np.maximum(MIN_CONTRAST, RELATIVE_CONTRAST * local))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    kept = [label for label in range(1, count + 1) if areas[label] >= MIN_AREA * short * short]
    return [Region(labels == label, int(areas[label])) for label in sorted(kept, key=lambda k: -areas[k])]


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


def dilate(mask: Mask, pixels: int) -> Mask:
    """Return the mask grown by a square of `pixels` to each side."""
    return _largest_within(mask, pixels)


def _runs(row: Mask) -> list[tuple[int, int]]:
    steps = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(steps[::2], steps[1::2], strict=True)]


def _largest_within(values: NDArray, reach: int) -> NDArray:
    for axis in (0, 1):
        padding = [(reach, reach) if a == axis else (0, 0) for a in (0, 1)]
        padded = np.pad(values, padding, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=axis)
        values = windows.max(axis=-1)
    return values
