"""The order of samples: which sample is at a given position, fixed for good and computed without reading any data.

The shards of a pass are permuted and laid end to end; the line of N samples is cut into L lanes; a lane reads its
range in windows and shuffles each. Position g of the global order belongs to pass g // N and to lane g mod L, so
rank r of W has the positions g = r (mod W) and, if W divides L, reads only its own lanes. Passes follow one another
without a gap: lane l of pass p has as many samples as there are positions g = l (mod L) in [pN, (p+1)N), so the tail
of a pass is neither dropped nor repeated. A position is the only state.

`Mixture` draws from sources by weight: all lanes walk the same fixed pattern of sources, spread as evenly as the
weights allow, each lane from its own starting point. So every lane draws from every source in the same proportion,
reads only the lane of the same number in each source, and the position alone determines how far each source is read.

`BlockOrder` assigns runs of positions to aspect-ratio buckets: the positions are cut into blocks of a fixed size; by
the end of pass p, a bucket of n samples has had floor((p+1)·n / size) blocks in total, so its samples come once per
pass and its tail is carried over; the blocks of a pass are permuted by (seed, stage, pass).
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.randomness import Draws, permutation

Integers = NDArray[np.int64]


class Window(NamedTuple):
    """Samples of one lane that are read together, in the order of use."""

    pass_number: int
    lane: int
    number: int
    first: int
    """Offset of the window's first sample within the lane's part of the pass."""
    shards: Integers
    ranks: Integers


class _Pass(NamedTuple):
    shard_order: Integers
    line: Integers
    rotation: int
    lane_first: Integers
    lane_count: Integers
    lane_start: Integers


class ShardOrder:
    """The endless order of the samples of a list of shards.

    Args:
        counts: number of planned samples in each shard.
        seed, stage: together with the pass, they determine the order.
        lanes: L, the number of places that are read in parallel.
        window: number of samples that are shuffled together within a lane.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, stage: str, lanes: int = 96, window: int = 32) -> None:
        if lanes < 1 or window < 1:
            raise ValueError(f"lanes and window must be at least 1, got {lanes} and {window}")
        if sum(counts) < 1:
            raise ValueError("counts must add up to at least one sample")
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.stage, self.lanes, self.window = seed, stage, lanes, window
        self.samples = int(self.counts.sum())
        self._windows: dict[int, Window] = {}
        self._pass = lru_cache(maxsize=8)(self._lay_out)

    def __reduce__(self) -> tuple[object, ...]:
        counts = self.counts.tolist()
        anew = partial(ShardOrder, counts, seed=self.seed, stage=self.stage, lanes=self.lanes, window=self.window)
        return anew, ()

    def window_of(self, position: int) -> tuple[Window, int]:
        """Return the window that contains a position, and the index of the position within it."""
        pass_number, lane, place, number = self._coordinates(position)
        window = self._windows.get(lane)
        if window is None or window.pass_number != pass_number or window.number != number:
            window = self._windows[lane] = self._fill(pass_number, lane, number)
        return window, place - window.first

    def following(self, window: Window) -> Window:
        """Return the window that the same lane reads next."""
        last = int(self._pass(window.pass_number).lane_first[window.lane]) + window.first + len(window.ranks) - 1
        pass_number, lane, _, number = self._coordinates((last + 1) * self.lanes + window.lane)
        return self._fill(pass_number, lane, number)

    def _coordinates(self, position: int) -> tuple[int, int, int, int]:
        """Return a position's pass and lane, its offset in the lane's part of the pass, and its window's number."""
        pass_number, lane = position // self.samples, position % self.lanes
        place = position // self.lanes - int(self._pass(pass_number).lane_first[lane])
        return pass_number, lane, place, (place + self._stagger(lane)) // self.window

    def _stagger(self, lane: int) -> int:
        # Lanes switch windows at different times, so that they do not all read at once.
        return lane * self.window // self.lanes

    def _lay_out(self, pass_number: int) -> _Pass:
        begin, lane = pass_number * self.samples, np.arange(self.lanes, dtype=np.int64)
        first = -((lane - begin) // self.lanes)
        count = -((lane - begin - self.samples) // self.lanes) - first
        shard_order = permutation(len(self.counts), self.seed, self.stage, "shards", pass_number)
        line = np.concatenate([[0], np.cumsum(self.counts[shard_order])])
        # Lanes get their ranges in random order from a random starting point, so that few shards mix as well as many.
        lane_order = permutation(self.lanes, self.seed, self.stage, "lanes", pass_number)
        start = np.empty_like(count)
        start[lane_order] = np.cumsum(count[lane_order]) - count[lane_order]
        rotation = Draws(self.seed, self.stage, "turn", pass_number).below(self.samples)
        return _Pass(shard_order, line, rotation, first, count, start)

    def _fill(self, pass_number: int, lane: int, number: int) -> Window:
        layout = self._pass(pass_number)
        begin = number * self.window - self._stagger(lane)
        first, last = max(begin, 0), min(begin + self.window, int(layout.lane_count[lane]))
        key = (self.seed, self.stage, "window", pass_number, lane, number)
        places = int(layout.lane_start[lane]) + first + permutation(last - first, *key)
        on_line = (places + layout.rotation) % self.samples
        part = np.searchsorted(layout.line, on_line, side="right") - 1
        return Window(pass_number, lane, number, first, layout.shard_order[part], on_line - layout.line[part])


def readers_per_rank(wanted: int, *, lanes: int, world: int) -> int:
    """Return the largest number of workers up to `wanted` that gives each worker lanes of its own; 0 if none does."""
    own = lanes // gcd(lanes, world)
    return max((n for n in range(1, wanted + 1) if own % n == 0), default=0)


def first_position(consumed: int, rank: int, world: int) -> int:
    """Return a rank's first position after `consumed` samples."""
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in [0, world), got {rank} of {world}")
    return consumed + (rank - consumed) % world


SHORTEST, LONGEST = 1 << 10, 1 << 20


class Mixture:
    """Maps positions of a mixture of sources to (source, position in that source).

    Args:
        weights: one positive number per source; each share is exact to a thousandth of the smallest share, or to
            2^-20 of the whole.
        lanes: number of lanes of the mixture and of each source.
    """

    def __init__(self, weights: Sequence[float], lanes: int) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights must be positive, got {list(weights)}")
        self.lanes = lanes
        self.pattern = even_pattern(weights)
        self._before = [np.concatenate([[0], np.cumsum(self.pattern == s)]) for s in range(len(weights))]

    def locate(self, position: int) -> tuple[int, int]:
        """Return the source of a position, and the position within that source's own endless order."""
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
    """Return a sequence of source numbers in which every stretch has about the shares that the weights ask for.

    The length is a power of two that grows with the unevenness of the weights; every source occurs at least once.
    """
    share = np.asarray(weights, dtype=np.float64) / sum(weights)
    length = SHORTEST
    while length < LONGEST and length * share.min() < 500:
        length *= 2
    counts = np.maximum(1, np.floor(share * length)).astype(np.int64)
    # The largest remainders get what is left; the commonest source makes up for what the rarest got in excess.
    by_remainder = np.argsort(counts - share * length, kind="stable")
    spare = length - int(counts.sum())
    counts[by_remainder[: max(spare, 0)]] += 1
    counts[int(np.argmax(counts))] += min(spare, 0)
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(times, kind="stable")]


class BlockOrder:
    """Maps positions of a set with buckets to (bucket, position in that bucket's own endless order).

    Args:
        samples: number of samples in each bucket.
        block: positions per block, at most the number of samples in the smallest bucket.
        seed, stage: together with the pass, they determine the order.
    """

    def __init__(self, samples: Sequence[int], *, block: int, seed: int, stage: str) -> None:
        if block < 1 or min(samples) < block:
            raise ValueError(f"every bucket must have at least a block of {block} samples, got {list(samples)}")
        self.samples = np.asarray(samples, dtype=np.int64)
        self.block, self.seed, self.stage = block, seed, stage

    def locate(self, position: int) -> tuple[int, int]:
        """Return the bucket of a position, and the position within that bucket's own order."""
        number, place = divmod(position, self.block)
        pass_number = self._pass_of(number)
        buckets, occurrence = _lay_out(tuple(self.samples.tolist()), self.block, self.seed, self.stage, pass_number)
        turn = number - int(self._blocks_before(pass_number).sum())
        return int(buckets[turn]), int(occurrence[turn]) * self.block + place

    def _blocks_before(self, pass_number: int) -> NDArray[np.int64]:
        return pass_number * self.samples // self.block

    def _pass_of(self, number: int) -> int:
        # The sum of the floors is less than one block per bucket below the exact value.
        guess = number * self.block // int(self.samples.sum())
        while int(self._blocks_before(guess + 1).sum()) <= number:
            guess += 1
        return guess


@lru_cache(maxsize=8)
def _lay_out(
    samples: tuple[int, ...], block: int, seed: int, stage: str, pass_number: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bucket of each block of a pass, and how many blocks of that bucket came before it in all passes."""
    counts = np.asarray(samples, dtype=np.int64)
    begin, end = pass_number * counts // block, (pass_number + 1) * counts // block
    in_line = np.repeat(np.arange(len(counts)), end - begin)
    buckets = in_line[permutation(len(in_line), seed, stage, "blocks", pass_number)]
    occurrence = np.empty_like(buckets)
    for bucket, first in enumerate(begin):
        where = buckets == bucket
        occurrence[where] = first + np.arange(where.sum())
    return buckets, occurrence
