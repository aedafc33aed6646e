"""Aspect-ratio buckets: the common alternative to the shifted square crop, for comparison with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.errors import UserError

Shape = tuple[int, int]


@dataclass(frozen=True)
class Buckets:
    """Shapes of about resolution² pixels, one of which each image is resized and cut to.

    Attributes:
        step_px: heights and widths are multiples of this.
        max_aspect: largest ratio of the long to the short side of a shape.
        block: positions of the global order that share a shape. The samples of a micro-batch over all ranks must
            divide it, and it must stay the same when a run goes on with other ranks. A bucket with fewer samples is
            not used; its images go to the nearest one that is.
    """

    step_px: int = 64
    max_aspect: float = 2.0
    block: int = 1024

    def __post_init__(self) -> None:
        for name in ("step_px", "max_aspect", "block"):
            if not getattr(self, name) >= 1:
                where = f"data.crop.buckets.{name}"
                raise UserError(f"is {getattr(self, name)}", where=where, hint="give 1 or more")

    def shapes(self, resolution: int) -> tuple[Shape, ...]:
        """All (height, width), from the tallest to the widest.

        For each short side the long one is the largest multiple of the step that keeps the area within resolution².

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
        """The number of the shape whose aspect ratio is nearest, in its logarithm; (n,), (n,) -> (n,)."""
        ratios = np.array([log(wide / high) for high, wide in shapes])
        own = np.log(np.maximum(width, 1) / np.maximum(height, 1))
        return np.abs(own[:, None] - ratios).argmin(axis=1)

    def shapes_in_use(self, height: NDArray[np.int64], width: NDArray[np.int64], resolution: int) -> tuple[Shape, ...]:
        """The shapes that at least a block of the images is nearest to; the smallest is given up until all do.

        Raises:
            UserError: there are fewer images than a block.
        """
        shapes = list(self.shapes(resolution))
        while True:
            counts = np.bincount(self.nearest(height, width, shapes), minlength=len(shapes))
            if counts.min() >= self.block:
                return tuple(shapes)
            if len(shapes) == 1:
                raise UserError(
                    f"there are {len(height)} images, fewer than a block of {self.block}",
                    where="data.crop.buckets.block",
                    hint="make it smaller (in a training it is the stage's batch size)",
                )
            del shapes[int(counts.argmin())]
