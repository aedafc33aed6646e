"""Raw samples of a plan: reads of known ranges, a window at a time where that is cheap.

Small local windows are one read, large ones a read a sample. Remote windows are read whole, the next one of each lane
by threads while the present one is used.
"""

import threading
import time
from collections import Counter, OrderedDict
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np

from hdm_lightning.data.config import StreamConfig
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.members import RawSample, read_sample
from hdm_lightning.data.order import Window
from hdm_lightning.data.plan import Place, Plan
from hdm_lightning.data.read_ahead import ReadAhead
from hdm_lightning.data.records import SampleTable
from hdm_lightning.data.shard_cache import ShardCache
from hdm_lightning.data.sources import PlannedShard
from hdm_lightning.data.storage import LocalFiles, is_local, read_range

LOCAL_SPAN = 1 << 18
"""Bytes of a local window up to which it is read at once rather than sample by sample."""

REMOTE_GAP = 1 << 18
"""Unwanted bytes that are read rather than asked around."""

RETRY_AFTER_S = 120.0
"""How long a dead shard is left alone, so that a dead server costs little time."""

STRIKES = 2
"""Reads of a shard that fail one after another before it counts as dead: an unlucky one costs its own samples alone."""

TABLES = 128
THREADS = 4

Data = bytes | SampleFault


class Address(NamedTuple):
    """Where one sample lies."""

    shard: PlannedShard
    ordinal: int
    start: int
    end: int


Loaded = dict[int, Data | Address]
"""What is known of the places of a window: bytes that were read ahead, or where they lie."""


class Reader:
    """Gives the raw sample of a place in a plan. One a process; it holds open files and the windows in use."""

    def __init__(self, plan: Plan, config: StreamConfig) -> None:
        self._plan = plan
        self._files = LocalFiles()
        self._cache = ShardCache(config.cache_dir, config.cache_gb) if config.cache_dir else None
        self._tables: OrderedDict[tuple[int, int], SampleTable] = OrderedDict()
        self._table_lock = threading.Lock()
        self._held: dict[tuple[int, int], tuple[Window, Loaded]] = {}
        self._coming: dict[tuple[int, int], tuple[Window, Future[Loaded]]] = {}
        self._ahead = ReadAhead(THREADS)
        self._strikes: Counter[str] = Counter()
        self._dead: dict[str, tuple[float, str]] = {}
        self._remote = [any(not is_local(shard.url) for shard in part.shards) for part in plan.parts]

    def address(self, place: Place) -> Address:
        """Where the sample of a place lies."""
        table, rank = self._table(place.part, place.shard), place.rank
        start = int(table.start[rank])
        shard = self._plan.parts[place.part].shards[place.shard]
        return Address(shard, int(table.ordinal[rank]), start, start + int(table.size[rank]))

    def read(self, place: Place) -> RawSample:
        """The raw sample of a place.

        Raises:
            SampleFault: it cannot be read.
        """
        # Each sample is used once, so that what was read ahead can go as it is used.
        data = self._window(place).pop(place.place, None)
        if data is None:
            data = self.address(place)
        if isinstance(data, Address):
            data = self._read(data)
        if isinstance(data, SampleFault):
            raise data
        return read_sample(data)

    def _window(self, place: Place) -> Loaded:
        """What is known of the window of a place."""
        key = (place.part, place.window.lane)
        held = self._held.get(key)
        if held is not None and _same(held[0], place.window):
            return held[1]
        coming = self._coming.pop(key, None)
        if coming is not None and _same(coming[0], place.window):
            loaded = coming[1].result()
        else:
            loaded = self._load(place.part, place.window, place.place)
        self._held[key] = (place.window, loaded)
        if self._remote[place.part]:
            following = self._plan.parts[place.part].order.following(place.window)
            self._coming[key] = (following, self._ahead.submit(partial(self._load, place.part, following, 0)))
        return loaded

    def _load(self, part: int, window: Window, begin: int) -> Loaded:
        """The bytes of a window's samples from a place on, where they are worth reading at once, else their places."""
        loaded: Loaded = {}
        for shard_number in np.unique(window.shards[begin:]):
            places = begin + np.flatnonzero(window.shards[begin:] == shard_number)
            table, ranks = self._table(part, int(shard_number)), window.ranks[places]
            starts, ends = table.start[ranks], table.start[ranks] + table.size[ranks]
            shard = self._plan.parts[part].shards[int(shard_number)]
            if is_local(shard.url) and ends.max() - starts.min() > LOCAL_SPAN:
                columns = (places, table.ordinal[ranks], starts, ends)
                for place, ordinal, start, end in zip(*(column.tolist() for column in columns), strict=True):
                    loaded[place] = Address(shard, ordinal, start, end)
                continue
            runs = [np.arange(len(places))] if is_local(shard.url) else _runs(starts, ends)
            for run in runs:
                first, last = int(starts[run].min()), int(ends[run].max())
                data = self._try(shard, first, last)
                for number in run:
                    loaded[int(places[number])] = _slice(data, first, int(starts[number]), int(ends[number]))
        return loaded

    def _read(self, address: Address) -> Data:
        return _slice(self._try(address.shard, address.start, address.end), address.start, address.start, address.end)

    def _try(self, shard: PlannedShard, start: int, end: int) -> Data:
        """Bytes of a shard, or why there are none."""
        dead = self._dead.get(shard.url)
        if dead is not None and time.monotonic() < dead[0]:
            return SampleFault(dead[1])
        try:
            data = self._bytes(shard, start, end)
        except FileNotFoundError:
            reason = "missing shard"
            self._strikes[shard.url] += STRIKES
        except OSError as error:
            reason = f"unreadable shard: {error}"
            self._strikes[shard.url] += 1
        else:
            self._strikes.pop(shard.url, None)
            return data
        if self._strikes[shard.url] >= STRIKES:
            self._dead[shard.url] = (time.monotonic() + RETRY_AFTER_S, reason)
        return SampleFault(reason)

    def _bytes(self, shard: PlannedShard, start: int, end: int) -> bytes:
        if is_local(shard.url):
            return self._files.read(shard.url, start, end)
        if self._cache is None:
            return read_range(shard.url, start, end)
        return self._cache.read(shard.url, shard.record, start, end)

    def _table(self, part: int, shard: int) -> SampleTable:
        with self._table_lock:
            table = self._tables.get((part, shard))
            if table is None:
                table = self._tables[part, shard] = self._plan.parts[part].shards[shard].table()
                if len(self._tables) > TABLES:
                    self._tables.popitem(last=False)
            else:
                self._tables.move_to_end((part, shard))
            return table


def _same(one: Window, other: Window) -> bool:
    return one.pass_number == other.pass_number and one.number == other.number


def _slice(data: Data, offset: int, start: int, end: int) -> Data:
    if isinstance(data, SampleFault):
        return data
    if len(data) < end - offset:
        return SampleFault("truncated shard: it ends before the sample does")
    return data[start - offset : end - offset]


def _runs(starts: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Samples that are near enough to each other to be read together."""
    by_start = np.argsort(starts, kind="stable")
    gaps = starts[by_start][1:] - ends[by_start][:-1]
    return np.split(by_start, np.flatnonzero(gaps > REMOTE_GAP) + 1)
