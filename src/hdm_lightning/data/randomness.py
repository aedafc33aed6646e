"""Random draws as functions of names and numbers: no generator is shared and there is no state to save.

A draw depends only on its purpose (seed, stage, position, name), so ranks, workers and restarts cannot change it. Only
raw 64-bit words are taken from numpy: its bit generators keep their streams for good (NEP 19), while the streams of
its distributions may change between versions.
"""

from collections.abc import Sequence
from hashlib import blake2b
from struct import unpack
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
_UNIT = 2.0**-53


def permutation(size: int, *key: int | str) -> NDArray[np.int64]:
    """Return a permutation of `range(size)` that depends on the key alone."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64)


class Draws:
    """A sequence of random draws that depends on the key alone (BLAKE2b in counter mode).

    Example: `Draws(seed, stage, position, "crop").below(20)`.
    """

    __slots__ = ("_block", "_count", "_key", "_words")

    def __init__(self, *key: int | str) -> None:
        self._key = blake2b(repr(key).encode(), digest_size=32).digest()
        self._block = 0
        self._count = 8
        self._words: tuple[int, ...] = ()

    def word(self) -> int:
        """Return the next 64 random bits."""
        if self._count == 8:
            counter = self._block.to_bytes(8, "little")
            self._words = unpack("<8Q", blake2b(counter, key=self._key, digest_size=64).digest())
            self._block += 1
            self._count = 0
        self._count += 1
        return self._words[self._count - 1]

    def uniform(self) -> float:
        """Return a number in [0, 1)."""
        return (self.word() >> 11) * _UNIT

    def below(self, bound: int) -> int:
        """Return an integer in [0, bound). The bias is below bound / 2^64."""
        if bound < 1:
            raise ValueError(f"bound must be at least 1, got {bound}")
        return (self.word() * bound) >> 64

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return the items in random order (Fisher-Yates)."""
        mixed = list(items)
        for last in range(len(mixed) - 1, 0, -1):
            other = self.below(last + 1)
            mixed[last], mixed[other] = mixed[other], mixed[last]
        return mixed

    def weighted(self, weights: Sequence[float]) -> int:
        """Return an index drawn in proportion to the weights, whose sum must be positive."""
        point = self.uniform() * sum(weights)
        for index, weight in enumerate(weights):
            point -= weight
            if point < 0:
                return index
        return max(index for index, weight in enumerate(weights) if weight > 0)
