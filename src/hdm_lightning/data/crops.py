"""Which part of an image a sample shows: the shifted square crop, as arithmetic on sizes.

The image is resized so that its short side is the resolution X; an X×X square is cut at a random offset of the long
side, both ends included (arXiv 2509.06068, shifted square crop). Four numbers tell where the crop lies in the full
image, from which token positions are made on the device.
"""

from dataclasses import dataclass, replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.buckets import Buckets
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.randomness import Draws
from hdm_lightning.errors import UserError


@dataclass(frozen=True)
class Crop:
    """A rectangle of a resized image, all in pixels of that resized full image.

    With `flip` the full image is mirrored first, and the rectangle lies in the mirrored one.
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
        """The four numbers of a batch: top, left, full_height, full_width."""
        return float(self.top), float(self.left), float(self.full_height), float(self.full_width)


@dataclass(frozen=True)
class CropRules:
    """How crops are chosen and which images are left out.

    Attributes:
        centre: take the middle of the long side instead of a random offset.
        min_size_px: shortest side of the original that is accepted.
        max_upscale: largest factor by which an original may be enlarged; None for any.
        max_aspect: largest ratio of the long to the short side.
        flip: mirror half of the samples, but for those whose caption names a side.
        buckets: aspect-ratio buckets instead of squares.
    """

    centre: bool = False
    min_size_px: int = 1
    max_upscale: float | None = None
    max_aspect: float = 8.0
    flip: bool = False
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        if not self.max_aspect >= 1:
            raise UserError(f"is {self.max_aspect}", where="data.crop.max_aspect", hint="give 1 or more")
        if self.max_upscale is not None and not self.max_upscale > 0:
            raise UserError(f"is {self.max_upscale}", where="data.crop.max_upscale", hint="give more than 0")

    def with_block(self, samples: int) -> "CropRules":
        """The same rules, a block of one bucket being the samples of a training step."""
        return self if self.buckets is None else replace(self, buckets=replace(self.buckets, block=samples))

    def accepts(self, height: NDArray[np.int64], width: NDArray[np.int64], resolution: int) -> NDArray[np.bool_]:
        """Which originals may be used; a size of 0 is unknown and accepted until it is read."""
        short, long = np.minimum(height, width), np.maximum(height, width)
        fine = (short >= self.min_size_px) & (short >= self._smallest(resolution)) & (long <= short * self.max_aspect)
        return fine | (short == 0)

    def check(self, height: int, width: int, resolution: int) -> None:
        """Raise `SampleFault` for an original that may not be used."""
        short, long = min(height, width), max(height, width)
        if short < self.min_size_px:
            raise SampleFault(f"too small: {width}x{height} pixels")
        if short < self._smallest(resolution):
            raise SampleFault(f"too small: {width}x{height} pixels would be enlarged too much")
        if long > short * self.max_aspect:
            raise SampleFault(f"too long: {width}x{height} pixels")

    def _smallest(self, resolution: int) -> float:
        """Shortest side of an original that needs no more enlargement than is allowed."""
        return resolution / (inf if self.max_upscale is None else self.max_upscale)

    def choose(self, height: int, width: int, shape: tuple[int, int], draws: Draws, *, may_flip: bool = False) -> Crop:
        """The crop of a shape (height, width) from an original of this upright size.

        Raises:
            SampleFault: the original may not be used.
        """
        out_height, out_width = shape
        self.check(height, width, round((out_height * out_width) ** 0.5))
        full_height, full_width = covering_size(height, width, out_height, out_width)
        spare_y, spare_x = full_height - out_height, full_width - out_width
        if self.centre:
            top, left = spare_y // 2, spare_x // 2
        else:
            top, left = draws.below(spare_y + 1), draws.below(spare_x + 1)
        flip = self.flip and draws.uniform() < 0.5 and may_flip
        return Crop(top, left, full_height, full_width, out_height, out_width, flip)


def covering_size(height: int, width: int, out_height: int, out_width: int) -> tuple[int, int]:
    """The smallest size of the same aspect ratio that covers a rectangle; one side fits it exactly.

    The other side is rounded to the nearest pixel, in integers.
    """
    if height * out_width >= width * out_height:
        return max(out_height, (2 * height * out_width + width) // (2 * width)), out_width
    return out_height, max(out_width, (2 * width * out_height + height) // (2 * height))
