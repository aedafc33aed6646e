"""Knows pictures again by aspect ratio and a miniature, through scaling, re-encoding and small changes."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE_PX = 24
# Of 8-bit values: two pictures are one when their miniatures differ by less on average and nowhere by more.
MAX_MEAN_DIFFERENCE, MAX_DIFFERENCE = 2.0, 32.0
MAX_ASPECT_RATIO = 1.05


class Miniatures:
    """The pictures seen so far."""

    def __init__(self) -> None:
        self._pictures: list[NDArray[np.float32]] = []
        self._marks: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return len(self._pictures)

    def add(self, encoded: bytes) -> bool:
        """Add an encoded picture unless it is nearly one of those seen; return whether it was new."""
        picture = Image.open(io.BytesIO(encoded)).convert("RGB")
        small = np.asarray(picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX), dtype=np.float32)
        mark = (float(np.log(picture.width / picture.height)), float(small.mean()))
        if self._holds(small, mark):
            return False
        self._pictures.append(small)
        self._marks.append(mark)
        return True

    def _holds(self, small: NDArray[np.float32], mark: tuple[float, float]) -> bool:
        if not self._marks:
            return False
        # Means differ by no more than the mean of the differences does: a cheap sieve before the pixels.
        limits = (np.log(MAX_ASPECT_RATIO), MAX_MEAN_DIFFERENCE)
        near = (np.abs(np.array(self._marks) - mark) < limits).all(axis=1)
        for i in np.flatnonzero(near):
            difference = np.abs(self._pictures[i] - small)
            if difference.mean() < MAX_MEAN_DIFFERENCE and difference.max() < MAX_DIFFERENCE:
                return True
        return False
