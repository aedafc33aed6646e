"""Several orders as one: which source, and which of its positions, a global position belongs to.

A fixed pattern over the sources, as even as their weights allow, is walked by each lane from another point. So every
lane draws from every source in the same proportion, a lane of the whole reads only that same lane of each source,
and how far each source has been read follows from the position alone.
"""

from collections.abc import Sequence

import numpy as np

PERIOD = 1024


class Mixture:
    """Positions of a whole to (source, position in that source).

    Args:
        weights: one positive number a source.
        lanes: number of lanes of the whole and of each source.
    """

    def __init__(self, weights: Sequence[float], lanes: int) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights must be positive, got {list(weights)}")
        self.lanes = lanes
        self.pattern = even_pattern(weights, PERIOD if len(weights) > 1 else 1)
        self._before = [np.concatenate([[0], np.cumsum(self.pattern == s)]) for s in range(len(weights))]

    def locate(self, position: int) -> tuple[int, int]:
        """The source that a position draws from, and the position within that source's own endless order."""
        row, lane = divmod(position, self.lanes)
        period = len(self.pattern)
        begin = lane * period // self.lanes
        source = int(self.pattern[(begin + row) % period])
        own_row = self._taken(source, begin + row) - self._taken(source, begin)
        return source, own_row * self.lanes + lane

    def _taken(self, source: int, steps: int) -> int:
        turns, rest = divmod(steps, len(self.pattern))
        before = self._before[source]
        return turns * int(before[-1]) + int(before[rest])


def even_pattern(weights: Sequence[float], length: int) -> np.ndarray:
    """A sequence of source numbers in which every stretch holds each source about as often as its weight says.

    Each place goes to the source that lags furthest behind its share; every source gets at least one place.
    """
    share = np.asarray(weights, dtype=np.float64) / sum(weights)
    share = np.maximum(share, 1.0 / length)
    share /= share.sum()
    pattern = np.empty(length, dtype=np.int64)
    lag = np.zeros(len(share))
    for place in range(length):
        lag += share
        pattern[place] = int(np.argmax(lag))
        lag[pattern[place]] -= 1.0
    return pattern
