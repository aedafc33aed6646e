"""Raw samples of a plan: reads of known ranges, a window at a time where that is cheap."""

import time
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.members import RawSample, read_sample
from hdm_lightning.data.order import Window
from hdm_lightning.data.plan import Place, Plan
from hdm_lightning.data.records import SampleTable
from hdm_lightning.data.sources import PlannedShard
from hdm_lightning.data.storage import LocalFiles, is_local, read_range

LOCAL_SPAN = 1 << 18
"""Bytes of a local window up to which it is read at once rather than sample by sample."""

REMOTE_GAP = 1 << 18
"""Unwanted bytes that are read rather than asked around."""

_TABLES = 128
_RETRY_AFTER_S = 120.0


class Address(NamedTuple):
    """Where one sample lies."""

    shard: PlannedShard
    ordinal: int
    start: int
    end: int


class Reader:
    """Gives the raw sample of a place in a plan. One a process; it holds open files and the windows in use."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._files = LocalFiles()
        self._tables: OrderedDict[tuple[int, int], SampleTable] = OrderedDict()
        self._windows: dict[tuple[int, int], tuple[Window, dict[int, bytes | SampleFault]]] = {}
        self._dead: dict[str, tuple[float, str]] = {}

    def address(self, place: Place) -> Address:
        """Where the sample of a place lies."""
        shard_number, rank = int(place.window.shards[place.place]), int(place.window.ranks[place.place])
        table = self._table(place.part, shard_number)
        start = int(table.start[rank])
        shard = self._plan.parts[place.part].shards[shard_number]
        return Address(shard, int(table.ordinal[rank]), start, start + int(table.size[rank]))

    def read(self, place: Place) -> RawSample:
        """The raw sample of a place.

        Raises:
            SampleFault: it cannot be read.
        """
        data = self._window(place).get(place.place)
        if data is None:
            data = self._read(self.address(place))
        if isinstance(data, SampleFault):
            raise data
        return read_sample(data)

    def _window(self, place: Place) -> dict[int, bytes | SampleFault]:
        """Bytes of the samples of a window that were read at once; those missing are read one by one."""
        key = (place.part, place.window.lane)
        held = self._windows.get(key)
        if held is None or held[0] is not place.window:
            held = self._windows[key] = (place.window, self._load(place.part, place.window))
        return held[1]

    def _load(self, part: int, window: Window) -> dict[int, bytes | SampleFault]:
        loaded: dict[int, bytes | SampleFault] = {}
        for shard_number in np.unique(window.shards):
            places = np.flatnonzero(window.shards == shard_number)
            table, ranks = self._table(part, int(shard_number)), window.ranks[places]
            starts, ends = table.start[ranks], table.start[ranks] + table.size[ranks]
            shard = self._plan.parts[part].shards[int(shard_number)]
            if is_local(shard.url):
                if ends.max() - starts.min() > LOCAL_SPAN:
                    continue
                runs = [np.arange(len(places))]
            else:
                runs = _runs(starts, ends)
            for run in runs:
                first, last = int(starts[run].min()), int(ends[run].max())
                data = self._try(shard, first, last)
                for number in run:
                    if isinstance(data, SampleFault):
                        loaded[int(places[number])] = data
                    else:
                        loaded[int(places[number])] = _slice(data, first, int(starts[number]), int(ends[number]))
        return loaded

    def _read(self, address: Address) -> bytes | SampleFault:
        data = self._try(address.shard, address.start, address.end)
        return data if isinstance(data, SampleFault) else _slice(data, address.start, address.start, address.end)

    def _try(self, shard: PlannedShard, start: int, end: int) -> bytes | SampleFault:
        """Bytes of a shard; one that failed is left alone for a while, so that a dead server costs little time."""
        dead = self._dead.get(shard.url)
        if dead is not None and time.monotonic() < dead[0]:
            return SampleFault(dead[1])
        try:
            return self._files.read(shard.url, start, end) if is_local(shard.url) else read_range(shard.url, start, end)
        except FileNotFoundError:
            reason = "missing shard"
        except OSError as error:
            reason = f"unreadable shard: {error}"
        self._dead[shard.url] = (time.monotonic() + _RETRY_AFTER_S, reason)
        return SampleFault(reason)

    def _table(self, part: int, shard: int) -> SampleTable:
        table = self._tables.get((part, shard))
        if table is None:
            table = self._tables[part, shard] = self._plan.parts[part].shards[shard].table()
            if len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end((part, shard))
        return table


def _slice(data: bytes, offset: int, start: int, end: int) -> bytes | SampleFault:
    if len(data) < end - offset:
        return SampleFault("truncated shard: it ends before the sample does")
    return data[start - offset : end - offset]


def _runs(starts: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Samples that are near enough to each other to be read together."""
    by_start = np.argsort(starts, kind="stable")
    gaps = starts[by_start][1:] - ends[by_start][:-1]
    return np.split(by_start, np.flatnonzero(gaps > REMOTE_GAP) + 1)
