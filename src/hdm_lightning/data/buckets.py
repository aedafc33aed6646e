"""Aspect-ratio buckets: the common alternative to the shifted square crop, for comparison with it."""

from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Buckets:
    """Shapes of about resolution² pixels, one of which each image is resized and cut to.

    Attributes:
        step_px: heights and widths are multiples of this.
        max_aspect: largest ratio of the long to the short side of a shape.
        block: positions of the global order that share a shape; the samples of one micro-batch on all ranks
            (batch size × ranks) must divide it, and it must stay the same when a run is resumed on other ranks.
    """

    step_px: int = 64
    max_aspect: float = 2.0
    block: int = 1024

    def shapes(self, resolution: int) -> tuple[tuple[int, int], ...]:
        """All (height, width), from the tallest to the widest.

        For each height the width is the largest multiple of the step that keeps the area within resolution².
        """
        found = set()
        for side in range(self.step_px, resolution + 1, self.step_px):
            other = resolution * resolution // side // self.step_px * self.step_px
            if other >= side and other <= side * self.max_aspect:
                found.update({(side, other), (other, side)})
        if not found:
            raise ValueError(f"step_px {self.step_px} leaves no bucket at resolution {resolution}")
        return tuple(sorted(found, key=lambda shape: (shape[1] / shape[0], shape)))

    def shape_of(self, height: int, width: int, resolution: int) -> tuple[int, int]:
        """The shape whose aspect ratio is nearest (in its logarithm) to that of an image."""
        shapes = self.shapes(resolution)
        numbers = self.numbers_of(np.array([height]), np.array([width]), resolution)
        return shapes[int(numbers[0])]

    def numbers_of(self, height: NDArray[np.int64], width: NDArray[np.int64], resolution: int) -> NDArray[np.int64]:
        """The number of each image's shape within `shapes(resolution)`; (n,) -> (n,)."""
        ratios = np.array([log(wide / high) for high, wide in self.shapes(resolution)])
        own = np.log(np.maximum(width, 1) / np.maximum(height, 1))
        return np.abs(own[:, None] - ratios).argmin(axis=1)
