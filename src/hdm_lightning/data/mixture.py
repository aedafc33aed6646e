"""Several orders as one: which part of the data, and which of its own positions, a global position belongs to.

`Mixture` draws from sources by weight: a fixed pattern over the sources, as even as their weights allow, is walked by
each lane from another point. So every lane draws from every source in the same proportion, a lane of the whole reads
only that same lane of each source, and how far each source has been read follows from the position alone.

`BlockOrder` gives runs of positions to aspect-ratio buckets: the positions are cut into blocks of a fixed size; in
pass p bucket b with n samples gets as many blocks as make its total floor((p+1)·n / size), so that its samples come
once a pass and its tail is carried over; the blocks of a pass are permuted by (seed, stage, pass).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.randomness import permutation

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


class BlockOrder:
    """Positions of a whole to (bucket, position in that bucket's own endless order).

    Args:
        samples: number of samples of each bucket.
        block: positions of a block, at most as many as the smallest bucket has samples.
        seed, stage: what the order depends on, beside the pass.
    """

    def __init__(self, samples: Sequence[int], *, block: int, seed: int, stage: str) -> None:
        if block < 1 or min(samples) < block:
            raise ValueError(f"every bucket must hold at least a block of {block} samples, got {list(samples)}")
        self.samples = np.asarray(samples, dtype=np.int64)
        self.block, self.seed, self.stage = block, seed, stage

    def locate(self, position: int) -> tuple[int, int]:
        """The bucket of a position, and the position within that bucket's own order."""
        number, place = divmod(position, self.block)
        pass_number = self._pass_of(number)
        buckets, occurrence = _lay_out(tuple(self.samples.tolist()), self.block, self.seed, self.stage, pass_number)
        turn = number - int(self._blocks_before(pass_number).sum())
        return int(buckets[turn]), int(occurrence[turn]) * self.block + place

    def _blocks_before(self, pass_number: int) -> NDArray[np.int64]:
        return pass_number * self.samples // self.block

    def _pass_of(self, number: int) -> int:
        # The total of all floors lies less than one block a bucket below the exact value.
        guess = number * self.block // int(self.samples.sum())
        while int(self._blocks_before(guess + 1).sum()) <= number:
            guess += 1
        return guess


@lru_cache(maxsize=8)
def _lay_out(
    samples: tuple[int, ...], block: int, seed: int, stage: str, pass_number: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bucket of each block of a pass, and how many blocks of that bucket came before it since the beginning."""
    counts = np.asarray(samples, dtype=np.int64)
    begin, end = pass_number * counts // block, (pass_number + 1) * counts // block
    in_line = np.repeat(np.arange(len(counts)), end - begin)
    buckets = in_line[permutation(len(in_line), seed, stage, "blocks", pass_number)]
    occurrence = np.empty_like(buckets)
    for bucket, first in enumerate(begin):
        where = buckets == bucket
        occurrence[where] = first + np.arange(where.sum())
    return buckets, occurrence
