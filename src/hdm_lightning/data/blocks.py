"""Runs of positions that share a bucket: which bucket, and which of its own positions, a global position belongs to.

The positions are cut into blocks of a fixed size. In pass p bucket b with n samples gets as many blocks as make its
total floor((p+1)·n / size), so that its samples come once a pass and its tail is carried over; the blocks of a pass
are permuted by (seed, stage, pass).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.randomness import permutation


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
