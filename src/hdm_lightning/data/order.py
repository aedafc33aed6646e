"""The order of samples: which sample stands at a position, for ever, without reading anything.

The shards of a pass are permuted and laid end to end; the line of N samples is cut into L lanes; a lane takes its
range in windows and shuffles each. Position g of the global order belongs to pass g // N and to lane g mod L, so that
every rank r of W has the positions g = r (mod W) and, where W divides L, reads only its own lanes. Passes follow one
another without a gap: lane l of pass p holds as many samples as there are positions g = l (mod L) in [pN, (p+1)N), so
that the tail of a pass is neither dropped nor repeated. A position is the only state.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.randomness import Draws, permutation

Integers = NDArray[np.int64]


class Slot(NamedTuple):
    """Where a sample lies: number of the shard, rank among its planned samples, and the pass."""

    shard: int
    rank: int
    pass_number: int


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

    def locate(self, position: int) -> Slot:
        """The sample at a position of the global order."""
        window, place = self.window_of(position)
        return Slot(int(window.shards[place]), int(window.ranks[place]), window.pass_number)

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
