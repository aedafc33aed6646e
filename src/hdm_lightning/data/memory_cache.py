"""Decoded samples of tiny sets, kept in memory so that later passes need neither file nor decoder.

Shapes: H×W pixels of the resized full image.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.crops import Crop
from hdm_lightning.data.members import IMAGE_EXTENSIONS, RawSample


class Decoded(NamedTuple):
    """A sample without the bytes of its image, the upright size of its original, and its resized full image."""

    raw: RawSample
    height: int
    width: int
    pixels: NDArray[np.uint8]
    """uint8 (3,H,W), RGB."""

    def cut(self, crop: Crop) -> NDArray[np.uint8]:
        """The pixels of a crop of the full image, as a view."""
        whole = self.pixels[:, :, ::-1] if crop.flip else self.pixels
        return whole[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


class MemoryCache:
    """Decoded samples by their place, until a limit is reached; what came first stays.

    Args:
        limit_gb: largest size of all pixels, in 10⁹ bytes.
    """

    def __init__(self, limit_gb: float) -> None:
        self._room = int(limit_gb * 1e9)
        self._kept: dict[tuple[int, int, int], Decoded] = {}

    def get(self, key: tuple[int, int, int]) -> Decoded | None:
        """The sample of a place, if it is kept."""
        return self._kept.get(key)

    def add(
        self, key: tuple[int, int, int], raw: RawSample, height: int, width: int, pixels: NDArray[np.uint8]
    ) -> Decoded:
        """Keep a sample, if there is room; returns it either way."""
        texts = {name: data for name, data in raw.members.items() if name not in IMAGE_EXTENSIONS}
        decoded = Decoded(RawSample(raw.key, texts), height, width, np.ascontiguousarray(pixels))
        if self._room >= pixels.size:
            self._room -= pixels.size
            self._kept[key] = decoded
        return decoded
