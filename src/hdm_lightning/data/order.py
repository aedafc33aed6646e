"""The order of samples: which sample stands at a position, for ever, without reading anything.

The shards of a pass are permuted and laid end to end; the line of N samples is cut into L lanes; a lane takes its
range in windows and shuffles each. Position g of the global order belongs to pass g // N and to lane g mod L, so that
every rank r of W has the positions g = r (mod W) and, where W divides L, reads only its own lanes. Passes follow one
another without a gap: lane l of pass p holds as many samples as there are positions g = l (mod L) in [pN, (p+1)N), so
that the tail of a pass is neither dropped nor repeated. A position is the only state.

`Mixture` draws from sources by weight: a fixed pattern over the sources, as even as their weights allow, is walked by
each lane from another point. So every lane draws from every source in the same proportion, a lane of the whole reads
only that same lane of each source, and how far each source has been read follows from the position alone.

`BlockOrder` gives runs of positions to aspect-ratio buckets: the positions are cut into blocks of a fixed size; in
pass p bucket b with n samples gets as many blocks as make its total floor((p+1)·n / size), so that its samples come
once a pass and its tail is carried over; the blocks of a pass are permuted by (seed, stage, pass).
"""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.randomness import Draws, permutation

Integers = NDArray[np.int64]


class Window(NamedTuple):
    """Samples of one lane that are read together, in the order in which they are used."""

    pass_number: int
    lane: int
    number: int
    first: int
    """Place of the window's first sample within the lane's part of the pass."""
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
        counts: planned samples of each shard.
        seed, stage: what the order depends on, beside the pass.
        lanes: L, the number of places that are read side by side.
        window: samples that are shuffled together within a lane.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, stage: str, lanes: int = 96, window: int = 32) -> None:
        if lanes < 1 or window < 1:
            raise ValueError(f"lanes and window must be at least 1, got {lanes} and {window}")
        if sum(counts) < 1:
            raise ValueError("counts must hold at least one sample")
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.stage, self.lanes, self.window = seed, stage, lanes, window
        self.samples = int(self.counts.sum())
        self._windows: dict[int, Window] = {}
        self._pass = lru_cache(maxsize=8)(self._lay_out)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.counts.tolist(), self.seed, self.stage, self.lanes, self.window)

    def window_of(self, position: int) -> tuple[Window, int]:
        """The window that holds a position, and the place of that position in it."""
        pass_number, lane, place, number = self._coordinates(position)
        window = self._windows.get(lane)
        if window is None or window.pass_number != pass_number or window.number != number:
            window = self._windows[lane] = self._fill(pass_number, lane, number)
        return window, place - window.first

    def following(self, window: Window) -> Window:
        """The window that its lane reads after this one."""
        last = int(self._pass(window.pass_number).lane_first[window.lane]) + window.first + len(window.ranks) - 1
        pass_number, lane, _, number = self._coordinates((last + 1) * self.lanes + window.lane)
        return self._fill(pass_number, lane, number)

    def _coordinates(self, position: int) -> tuple[int, int, int, int]:
        """Pass and lane of a position, its place in the lane's part of the pass, and the number of its window."""
        pass_number, lane = position // self.samples, position % self.lanes
        place = position // self.lanes - int(self._pass(pass_number).lane_first[lane])
        return pass_number, lane, place, (place + self._stagger(lane)) // self.window

    def _stagger(self, lane: int) -> int:
        # Lanes change windows at different times, so that their reads do not come all at once.
        return lane * self.window // self.lanes

    def _lay_out(self, pass_number: int) -> _Pass:
        begin, lane = pass_number * self.samples, np.arange(self.lanes, dtype=np.int64)
        first = -((lane - begin) // self.lanes)
        count = -((lane - begin - self.samples) // self.lanes) - first
        shard_order = permutation(len(self.counts), self.seed, self.stage, "shards", pass_number)
        line = np.concatenate([[0], np.cumsum(self.counts[shard_order])])
        # Lanes take their ranges in a random order from a random point, so that few shards mix as well as many.
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


def _rebuild(counts: list[int], seed: int, stage: str, lanes: int, window: int) -> ShardOrder:
    return ShardOrder(counts, seed=seed, stage=stage, lanes=lanes, window=window)


def readers_per_rank(wanted: int, *, lanes: int, world: int) -> int:
    """The largest number of workers, at most `wanted`, that leaves each its own lanes; 0 for none."""
    own = lanes // gcd(lanes, world)
    return max((n for n in range(1, wanted + 1) if own % n == 0), default=0)


def first_position(consumed: int, rank: int, world: int) -> int:
    """The first position of a rank at or after a number of consumed samples."""
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in [0, world), got {rank} of {world}")
    return consumed + (rank - consumed) % world


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
