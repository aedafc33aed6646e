"""Several orders as one: which source, and which of its positions, a global position belongs to.

A fixed pattern over the sources, as even as their weights allow, is walked by each lane from another point. So every
lane draws from every source in the same proportion, a lane of the whole reads only that same lane of each source,
and how far each source has been read follows from the position alone.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHORTEST, LONGEST = 1 << 10, 1 << 20


class Mixture:
    """Positions of a whole to (source, position in that source).

    Args:
        weights: one positive number a source; shares are kept to a part in a thousand of the smallest, or to one in
            2^20 of the whole.
        lanes: number of lanes of the whole and of each source.
    """

    def __init__(self, weights: Sequence[float], lanes: int) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights must be positive, got {list(weights)}")
        self.lanes = lanes
        self.pattern = even_pattern(weights)
        self._before = [np.concatenate([[0], np.cumsum(self.pattern == s)]) for s in range(len(weights))]

    def locate(self, position: int) -> tuple[int, int]:
        """The source that a position draws from, and the position within that source's own endless order."""
        if len(self._before) == 1:
            return 0, position
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


def even_pattern(weights: Sequence[float]) -> NDArray[np.int64]:
    """A sequence of source numbers in which every stretch holds each source about as often as its weight says.

    The length is a power of two that grows with the unevenness of the weights; every source has a place.
    """
    share = np.asarray(weights, dtype=np.float64) / sum(weights)
    length = SHORTEST
    while length < LONGEST and length * share.min() < 500:
        length *= 2
    counts = np.maximum(1, np.floor(share * length)).astype(np.int64)
    # Largest remainders take what is left; the commonest source gives back what the rarest ones took too much.
    by_remainder = np.argsort(counts - share * length, kind="stable")
    spare = length - int(counts.sum())
    counts[by_remainder[: max(spare, 0)]] += 1
    counts[int(np.argmax(counts))] += min(spare, 0)
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(times, kind="stable")]
