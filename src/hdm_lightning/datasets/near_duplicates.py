"""Near copies of images: 64-bit perceptual hashes, and which of them are within a few bits of each other.

The search is exact. Two hashes that differ in at most d bits agree in at least k of any d + k blocks of bits, so it is
enough to compare those that agree in k blocks, for each choice of k blocks; k depends on the number of hashes. Groups
that are still large are searched again by their other bits. Memory grows only with the number of hashes.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import combinations
from math import comb, log2
from operator import or_

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.crops import Crop, covering_size
from hdm_lightning.data.decode import decode

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]

BITS = 64
MOST_BITS = 12
"""Largest distance that is searched: beyond it, images with little in common would count as copies."""

SEEN_PX = 128
"""Short side, in pixels, at which an image is decoded; its hash is computed at 32×32 pixels."""

MOST_MASKS = 300
LARGEST_GROUP = 4096
DEEPEST = 3
"""How often a group that is still large is searched again by its other bits."""

LOOKED_AT = 512
CLUSTER = 1 / 32
"""Share of copies in a sample of pairs above which it is worth comparing all pairs of a group."""

COMPARED_AT_ONCE = 1 << 21


def perceptual_hash(data: bytes) -> int:
    """Return the 64 bits of imagehash's `phash` of an image; transparent parts are white.

    Raises:
        SampleFault: the bytes are not a usable image.
    """
    import imagehash  # noqa: PLC0415  (optional)
    from PIL import Image  # noqa: PLC0415  (with it)

    pixels, _ = decode(data, _whole)
    bits = imagehash.phash(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))).hash
    return int.from_bytes(np.packbits(bits.reshape(-1)).tobytes(), "big")


def _whole(height: int, width: int) -> Crop:
    side = min(SEEN_PX, height, width)
    full = covering_size(height, width, side, side)
    return Crop(0, 0, *full, *full)


def better_copies(hashes: Hashes, order: Numbers, distance: int) -> Numbers:
    """Return, for each hash, the first in the order that precedes it and is within the distance; -1 if there is none.

    Args:
        hashes: uint64 (n,).
        order: int64 (n,), a permutation: of two copies, the better one is the one with the lower number.
        distance: bits.

    Returns:
        int64 (n,), positions in `hashes`.
    """
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    by_hash = np.lexsort((order, hashes))
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = hashes[by_hash[1:]] != hashes[by_hash[:-1]]
    first = by_hash[np.flatnonzero(new)]
    least = order[first].copy()  # the first in the order stands for all equal ones
    if distance:
        _Search(hashes[first], order[first], distance, least).over(np.arange(len(first)), range(BITS), DEEPEST)
    best = np.empty(len(hashes), dtype=np.int64)
    best[by_hash] = place[least[np.cumsum(new) - 1]]
    return np.where(best == np.arange(len(hashes)), -1, best)


class _Search:
    """Writes to `least`, for each of the distinct hashes, the lowest order within the distance."""

    def __init__(self, hashes: Hashes, order: Numbers, distance: int, least: Numbers) -> None:
        self.hashes, self.order, self.distance, self.least = hashes, order, distance, least

    def over(self, numbers: Numbers, bits: Sequence[int], deeper: int) -> None:
        """Compare hashes, given by number, that agree in all but `bits`; search large groups `deeper` times again."""
        for mask in _masks(bits, self.distance, len(numbers)):
            keys = self.hashes[numbers] & np.uint64(mask)
            by_key = np.argsort(keys, kind="stable")
            keys, sorted_numbers = keys[by_key], numbers[by_key]
            bounds = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1], True])
            sizes = np.diff(bounds)
            rest = [bit for bit in bits if not mask >> bit & 1]
            large = sizes > LARGEST_GROUP if deeper and len(rest) > self.distance else np.zeros(len(sizes), dtype=bool)
            for place in np.flatnonzero(large).tolist():
                group = sorted_numbers[bounds[place] : bounds[place + 1]]
                large[place] = not self._is_cluster(group)
                if large[place]:
                    self.over(group, rest, deeper - 1)
            few = np.repeat(~large, sizes)
            self._compare(sorted_numbers[few], keys[few])

    def _is_cluster(self, numbers: Numbers) -> bool:
        """Return whether many pairs of a group are copies, judged from a sample of them."""
        some = self.hashes[numbers[np.linspace(0, len(numbers) - 1, LOOKED_AT).astype(np.int64)]]
        near = bit_count(some ^ np.roll(some, LOOKED_AT // 2)) <= self.distance
        return bool(near.mean() > CLUSTER)

    def _compare(self, numbers: Numbers, keys: Hashes) -> None:
        """Compare all pairs with equal keys, which are next to each other."""
        for begin in range(0, len(numbers), COMPARED_AT_ONCE):
            ones, step = np.arange(begin, min(begin + COMPARED_AT_ONCE, len(numbers))), 1
            while len(ones):
                ones = ones[ones + step < len(numbers)]
                ones = ones[keys[ones] == keys[ones + step]]
                self._note(numbers[ones], numbers[ones + step])
                step += 1

    def _note(self, one: Numbers, other: Numbers) -> None:
        near = bit_count(self.hashes[one] ^ self.hashes[other]) <= self.distance
        one, other = one[near], other[near]
        np.minimum.at(self.least, one, self.order[other])
        np.minimum.at(self.least, other, self.order[one])


def _masks(bits: Sequence[int], distance: int, count: int) -> Iterator[int]:
    """Yield masks such that two hashes that differ in at most `distance` of the bits agree in at least one mask."""
    if len(bits) <= distance:
        yield 0  # all are within the distance of each other
        return
    blocks = min(range(distance + 1, len(bits) + 1), key=lambda each: _cost(len(bits), distance, each, count))
    parts = [reduce(or_, (1 << int(bit) for bit in part)) for part in np.array_split(np.asarray(bits), blocks)]
    for chosen in combinations(parts, blocks - distance):
        yield reduce(or_, chosen)


def _cost(bits: int, distance: int, blocks: int, count: int) -> float:
    """Return the cost, in comparisons and sorting, of a number of blocks for random hashes."""
    masks = comb(blocks, distance)
    if masks > MOST_MASKS and blocks > distance + 1:
        return float("inf")
    group = count / 2 ** (bits * (blocks - distance) // blocks)
    return masks * count * (log2(count + 2) + group)


def bit_count(numbers: Hashes) -> Numbers:
    """Return the number of bits set in each number (in parallel: pairs, then quads, then bytes)."""
    two, four, eight = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
    numbers = numbers - ((numbers >> np.uint64(1)) & two)
    numbers = (numbers & four) + ((numbers >> np.uint64(2)) & four)
    numbers = (numbers + (numbers >> np.uint64(4))) & eight
    return ((numbers * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)
