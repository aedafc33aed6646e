"""Which part of an image a sample shows: the shifted square crop or an aspect-ratio bucket, as arithmetic on sizes.

Shifted square crop (arXiv 2509.06068): the image is resized so that its short side is the resolution X; an X×X square
is cut at a random offset along the long side, both ends included. Aspect-ratio buckets are the common alternative:
each image is resized and cropped to the nearest of a few shapes. Four numbers describe where the crop lies in the full
image; the token positions are computed from them on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.randomness import Draws
from hdm_lightning.errors import UserError

Shape = tuple[int, int]


def require_least(where: str, value: float | None, least: int) -> None:
    """Raise `UserError` if a value is below `least`; None passes."""
    if value is not None and not value >= least:
        raise UserError(f"is {value}", where=where, hint=f"set it to {least} or more")


@dataclass(frozen=True)
class Buckets:
    """Shapes of about resolution² pixels; each image is resized and cropped to one of them.

    Attributes:
        step_px: heights and widths are multiples of this.
        max_aspect: largest ratio of the long to the short side of a shape.
        block: number of consecutive positions of the global order that share a shape. It must be a multiple of the
            micro-batch over all ranks, and stay the same when a run resumes on another number of ranks. A bucket with
            fewer samples is not used; its images go to the nearest one that is.
    """

    step_px: int = 64
    max_aspect: float = 2.0
    block: int = 1024

    def __post_init__(self) -> None:
        for name in ("step_px", "max_aspect", "block"):
            require_least(f"data.crop.buckets.{name}", getattr(self, name), 1)

    def shapes(self, resolution: int) -> tuple[Shape, ...]:
        """Return all shapes (height, width), from the tallest to the widest.

        For each short side, the long side is the largest multiple of the step that keeps the area within resolution².

        Raises:
            UserError: no shape is possible.
        """
        found = set()
        for side in range(self.step_px, resolution + 1, self.step_px):
            other = resolution * resolution // side // self.step_px * self.step_px
            if side <= other <= side * self.max_aspect:
                found.update({(side, other), (other, side)})
        if not found:
            raise UserError(
                f"no shape at resolution {resolution} has sides that are multiples of {self.step_px}",
                where="data.crop.buckets.step_px",
                hint="make it a divisor of the resolution",
            )
        return tuple(sorted(found, key=lambda shape: (shape[1] / shape[0], shape)))

    def nearest(
        self, height: NDArray[np.int64], width: NDArray[np.int64], shapes: Sequence[Shape]
    ) -> NDArray[np.int64]:
        """Return the index of the shape whose log aspect ratio is nearest; (n,), (n,) -> (n,).

        Args:
            height, width: sizes in pixels.
            shapes: (height, width) each, from the tallest to the widest; ties go to the first.
        """
        return np.searchsorted(_borders(shapes, shapes[1:]), _ratios(height, width))

    def shapes_in_use(self, images: "AspectCounts") -> tuple[Shape, ...]:
        """Return the shapes left after dropping the rarest one until at least a block of images is nearest to each.

        Raises:
            UserError: there are fewer images than a block.
        """
        shapes = list(images.shapes)
        while True:
            counts = images.nearest_to(shapes)
            if counts.min() >= self.block:
                return tuple(shapes)
            if len(shapes) == 1:
                raise UserError(
                    f"there are {int(counts.sum())} images, fewer than a block of {self.block}",
                    where="data.crop.buckets",
                    hint="lower the batch size of a step (in training, the stage's), which is the block",
                )
            del shapes[int(counts.argmin())]


class AspectCounts:
    """Histogram of aspect ratios, fine enough for every subset of the shapes, so that one pass over the images will do.

    Args:
        shapes: (height, width) each, from the tallest to the widest.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = tuple(shapes)
        first, second = zip(*combinations(shapes, 2), strict=True) if len(shapes) > 1 else ((), ())
        self._borders = np.unique(_borders(first, second))
        self._counts = np.zeros(len(self._borders) + 1, dtype=np.int64)
        self._nearest = self._nearest_of(shapes)

    def add(self, height: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count images of these sizes in pixels, (n,) each; return how many of them are nearest to each shape."""
        places = np.searchsorted(self._borders, _ratios(height, width))
        counts = np.bincount(places, minlength=len(self._counts))
        self._counts += counts
        return np.bincount(self._nearest, counts, minlength=len(self.shapes)).astype(np.int64)

    def include(self, others: "AspectCounts") -> None:
        """Add the counts of other images for the same shapes."""
        self._counts += others._counts

    def nearest_to(self, shapes: Sequence[Shape]) -> NDArray[np.int64]:
        """Return how many of all images are nearest to each shape of a subset, (len(shapes),)."""
        return np.bincount(self._nearest_of(shapes), self._counts, minlength=len(shapes)).astype(np.int64)

    def _nearest_of(self, shapes: Sequence[Shape]) -> NDArray[np.int64]:
        """Return the index of the shape nearest to the images of each bin, i.e. between two borders."""
        beginnings = np.concatenate([[0.0], self._borders])
        return np.searchsorted(_borders(shapes, shapes[1:]), beginnings, side="right")


def _ratios(height: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.maximum(width, 1) / np.maximum(height, 1)


def _borders(first: Sequence[Shape], second: Sequence[Shape]) -> NDArray[np.float64]:
    """Return the aspect ratio halfway between two shapes on a log scale, for each pair."""
    pairs = zip(first, second, strict=False)
    return np.sqrt([(wide * wider) / (high * lower) for (high, wide), (lower, wider) in pairs])


@dataclass(frozen=True)
class Crop:
    """A rectangle of a resized image, in pixels of the resized full image.

    With `flip`, the full image is mirrored first, and the rectangle refers to the mirrored image.
    """

    top: int
    left: int
    full_height: int
    full_width: int
    height: int
    width: int
    flip: bool = False

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """The four crop numbers in a batch: top, left, full_height, full_width."""
        return float(self.top), float(self.left), float(self.full_height), float(self.full_width)


@dataclass(frozen=True)
class CropRules:
    """How crops are chosen and which images are left out.

    Attributes:
        centre: crop the center of the long side instead of a random offset.
        min_size_px: smallest accepted short side of the original.
        max_upscale: largest factor by which an original may be enlarged; None for no limit.
        max_aspect: largest accepted ratio of the long to the short side.
        flip: mirror half of the samples, except those whose caption mentions left or right.
        buckets: aspect-ratio buckets instead of squares.
    """

    centre: bool = False
    min_size_px: int = 1
    max_upscale: float | None = None
    max_aspect: float = 8.0
    flip: bool = False
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        require_least("data.crop.max_aspect", self.max_aspect, 1)
        if self.max_upscale is not None and not self.max_upscale > 0:
            raise UserError(f"is {self.max_upscale}", where="data.crop.max_upscale", hint="set it above 0")

    def accepts(self, height: NDArray[np.int64], width: NDArray[np.int64], resolution: int) -> NDArray[np.bool_]:
        """Return which originals may be used; a size of 0 is unknown and accepted until the image is read."""
        short, long = np.minimum(height, width), np.maximum(height, width)
        fine = (short >= self.min_size_px) & (short >= self._smallest(resolution)) & (long <= short * self.max_aspect)
        return fine | (short == 0)

    def check(self, height: int, width: int, resolution: int) -> None:
        """Raise `SampleFault` if an original may not be used."""
        short, long = min(height, width), max(height, width)
        if short < self.min_size_px:
            raise SampleFault(f"too small: {width}x{height} pixels")
        if short < self._smallest(resolution):
            raise SampleFault(f"too small: {width}x{height} pixels would be enlarged too much")
        if long > short * self.max_aspect:
            raise SampleFault(f"too long: {width}x{height} pixels")

    def _smallest(self, resolution: int) -> float:
        """Return the smallest short side that needs no more than `max_upscale`."""
        return resolution / (inf if self.max_upscale is None else self.max_upscale)

    def choose(
        self,
        height: int,
        width: int,
        shape: tuple[int, int],
        draws: Draws,
        *,
        may_flip: bool = False,
        grid: int = 1,
    ) -> Crop:
        """Return a crop of `shape` (height, width) from an original of this upright size.

        The crop's edges are multiples of `grid`, as the shape's sides must be: the same random draws choose among the
        offsets on the grid.

        Raises:
            SampleFault: the original may not be used.
        """
        out_height, out_width = shape
        self.check(height, width, round((out_height * out_width) ** 0.5))
        full_height, full_width = covering_size(height, width, out_height, out_width)
        spare_y, spare_x = full_height - out_height, full_width - out_width
        if self.centre:
            top, left = (spare // grid // 2 * grid for spare in (spare_y, spare_x))
        else:
            top, left = (draws.below(spare // grid + 1) * grid for spare in (spare_y, spare_x))
        flip = self.flip and draws.uniform() < 0.5 and may_flip
        return Crop(top, left, full_height, full_width, out_height, out_width, flip)


def covering_size(height: int, width: int, out_height: int, out_width: int) -> tuple[int, int]:
    """Return the smallest size of the same aspect ratio that covers a rectangle; one side fits it exactly.

    The other side is rounded to the nearest pixel in integer arithmetic.
    """
    if height * out_width >= width * out_height:
        return max(out_height, (2 * height * out_width + width) // (2 * width)), out_width
    return out_height, max(out_width, (2 * width * out_height + height) // (2 * height))
