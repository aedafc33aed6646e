"""Raw samples of a plan: reads of known ranges, a window at a time where that is cheap.

Small local windows take one read, large ones one read per sample. Remote windows are read whole; threads read the next
one of each lane while the current one is used.
"""

import logging
import os
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.order import Window
from hdm_lightning.data.rules import StreamConfig
from hdm_lightning.data.sample_plan import Place, Plan, PlannedShard
from hdm_lightning.data.sample_table import Form, RawSample, SampleTable
from hdm_lightning.data.shard_bytes import ReplacedShard, Version, is_local, read_range
from hdm_lightning.data.shard_cache import ShardCache
from hdm_lightning.printable import in_one_line
from hdm_lightning.regular_files import open_regular

T = TypeVar("T")
_log = logging.getLogger(__name__)

LOCAL_SPAN = 1 << 18
"""Largest span in bytes of a local shard's samples that is read at once rather than sample by sample."""

REMOTE_GAP = 1 << 18
"""Largest gap in bytes between samples that is read through instead of splitting the request."""

MAX_READ_BYTES = 1 << 30
"""Largest size of one read; larger samples in an index are not believed."""

RETRY_AFTER_S = 120.0
"""How long a dead shard is left alone, so that a dead server costs little time."""

STRIKES = 2
"""Consecutive failed reads before a shard counts as dead; a single failure costs only its own samples."""

TABLES = 128
OPEN_FILES = 64
THREADS = 4

Data = bytes | SampleFault


class Address(NamedTuple):
    """Where one sample lies, and how its members are cut out."""

    shard: PlannedShard
    ordinal: int
    start: int
    end: int
    form: Form


Loaded = dict[int, tuple[Address, Data | None]]
"""Samples of a window by index: their addresses, and the bytes of those that were read ahead."""


class Reader:
    """Reads the raw sample at a place of a plan. Each process has its own, with open files and the windows in use.

    Args:
        plan, config: of the stream.
        stop: position where the stream ends, beyond which nothing is read ahead; None for an endless stream.
    """

    def __init__(self, plan: Plan, config: StreamConfig, *, stop: int | None = None) -> None:
        self._plan, self._stop = plan, stop
        self._files = LocalFiles()
        self._cache = ShardCache(config.cache_dir, config.cache_gb) if config.cache_dir else None
        self._table = lru_cache(TABLES)(lambda part, shard: plan.parts[part].shards[shard].table())
        self._held: dict[tuple[int, int], tuple[Window, Loaded]] = {}
        self._coming: dict[tuple[int, int], tuple[Window, Future[Loaded]]] = {}
        self._ahead = ReadAhead(THREADS)
        self._strikes: Counter[str] = Counter()
        self._dead: dict[str, tuple[float, str]] = {}
        self._compared: set[str] = set()
        self._told = False
        self._remote = {shard.url for part in plan.parts for shard in part.shards if not is_local(shard.url)}
        self._reads_ahead = [any(shard.url in self._remote for shard in part.shards) for part in plan.parts]

    def address(self, place: Place) -> Address:
        """Return the address of the sample at a place."""
        shard = self._plan.parts[place.part].shards[place.shard]
        (address,) = _addresses(shard, self._table(place.part, place.shard), np.array([place.rank]))
        return address

    def read(self, place: Place) -> RawSample:
        """Return the raw sample at a place. Raises SampleFault: it cannot be read."""
        # Each sample is used once, so what was read ahead can be dropped on use.
        address, data = self._window(place).pop(place.place, (None, None))
        if address is None:
            address = self.address(place)
        if data is None:
            data = _slice(self._try(address.shard, address.start, address.end), address.start, address)
        if isinstance(data, SampleFault):
            raise data
        return address.form.cut(data)

    def _window(self, place: Place) -> Loaded:
        """Return the loaded window of a place, and start reading the next one of its lane."""
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
        if self._reads_ahead[place.part]:
            following = self._plan.parts[place.part].order.following(place.window)
            if self._asked_for(place.part, following):
                self._coming[key] = (following, self._ahead.submit(partial(self._load, place.part, following, 0)))
        return loaded

    def _asked_for(self, part: int, window: Window) -> int:
        """Return how many places of a window, from its first, may lie before the end of the stream."""
        if self._stop is None or window.pass_number:
            return len(window.ranks)
        # At most all positions before the end are of this part, and its lanes take turns.
        of_lane = -(-self._stop // self._plan.parts[part].order.lanes)
        return min(max(of_lane - window.first, 0), len(window.ranks))

    def _load(self, part: int, window: Window, begin: int) -> Loaded:
        """Return the addresses of a window's samples from `begin`, with their bytes if worth reading together."""
        loaded: Loaded = {}
        shards = window.shards[begin : self._asked_for(part, window)]
        for number in np.unique(shards).tolist():
            places = begin + np.flatnonzero(shards == number)
            shard = self._plan.parts[part].shards[number]
            addresses = _addresses(shard, self._table(part, number), window.ranks[places])
            read = self._read_runs if shard.url in self._remote else self._read_near
            loaded.update(zip(places.tolist(), zip(addresses, read(addresses), strict=True), strict=True))
        return loaded

    def _read_near(self, addresses: list[Address]) -> list[Data | None]:
        """Return the bytes of a local shard's samples if they are close together, else None for each."""
        first, last = min(each.start for each in addresses), max(each.end for each in addresses)
        if last - first > LOCAL_SPAN:
            return [None] * len(addresses)
        data = self._try(addresses[0].shard, first, last)
        return [_slice(data, first, each) for each in addresses]

    def _read_runs(self, addresses: list[Address]) -> list[Data | None]:
        """Return the bytes of a remote shard's samples, using one read for samples that are close together."""
        found: list[Data | None] = [None] * len(addresses)
        for run in _runs(np.array([each.start for each in addresses]), np.array([each.end for each in addresses])):
            first, last = min(addresses[n].start for n in run), max(addresses[n].end for n in run)
            data = self._try(addresses[0].shard, first, last)
            for number in run:
                found[number] = _slice(data, first, addresses[number])
        return found

    def _try(self, shard: PlannedShard, start: int, end: int) -> Data:
        """Return bytes of a shard, or the fault that prevents it."""
        dead = self._dead.get(shard.url)
        if dead is not None and time.monotonic() < dead[0]:
            return SampleFault(dead[1])
        if end - start > MAX_READ_BYTES:
            return SampleFault(f"sample too large: {end - start} bytes")
        try:
            data = self._bytes(shard, start, end)
        except FileNotFoundError:
            reason = "missing shard"
            self._strikes[shard.url] += STRIKES
        except ReplacedShard as error:
            reason = f"replaced shard: {error}"
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
        if shard.url not in self._remote:
            return self._files.read(shard.url, start, end)
        see = None if shard.url in self._compared else partial(self._compare, shard)
        if self._cache is None:
            return read_range(shard.url, start, end, see)
        return self._cache.read(shard.url, shard.record.bytes, shard.record.sha256, start, end, see)

    def _compare(self, shard: PlannedShard, version: Version) -> None:
        """Compare the version of a shard that a server reports on the first read with the index.

        Raises:
            ReplacedShard: the size differs. A different tag alone only warns, as servers differ: samples are checked.
        """
        record, resized = shard.record, version.size not in (None, shard.record.bytes)
        renamed = bool(record.tag and version.tag) and record.tag != version.tag
        sizes = f"has {version.size} bytes, the index says {record.bytes}"
        if (resized or renamed) and not self._told:
            self._told = True  # one of thousands is enough
            what = sizes if resized else f"is version {version.tag} now, but version {record.tag} was indexed"
            hint = "index the shards again: hdm-shards index ADDRESSES --out index.json"
            _log.warning("%s", in_one_line(f"warning: {shard.url} {what}; {hint}"))
        if resized:
            raise ReplacedShard(sizes)
        self._compared.add(shard.url)


def _addresses(shard: PlannedShard, table: SampleTable, ranks: NDArray[np.int64]) -> list[Address]:
    chosen = table.take(ranks)
    columns = (chosen.ordinal.tolist(), chosen.start.tolist(), (chosen.start + chosen.size).tolist(), chosen.forms())
    return [Address(shard, *row) for row in zip(*columns, strict=True)]


def _same(one: Window, other: Window) -> bool:
    return one.pass_number == other.pass_number and one.number == other.number


def _slice(data: Data, offset: int, address: Address) -> Data:
    if isinstance(data, SampleFault):
        return data
    if len(data) < address.end - offset:
        return SampleFault("truncated shard: it ends before the sample does")
    return data[address.start - offset : address.end - offset]


def _runs(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> list[list[int]]:
    """Group samples that are close enough to be read together."""
    by_start = np.argsort(starts, kind="stable")
    gaps = starts[by_start][1:] - ends[by_start][:-1]
    return [run.tolist() for run in np.split(by_start, np.flatnonzero(gaps > REMOTE_GAP) + 1)]


class LocalFiles:
    """Reads ranges of local files; keeps the last files open until it is closed or garbage-collected. Thread-safe."""

    def __init__(self) -> None:
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        # Not __del__, which would no longer find `os` at interpreter shutdown.
        weakref.finalize(self, _close_all, self._handles).atexit = False

    def read(self, path: str, start: int, end: int) -> bytes:
        """Return bytes [start, end) of a file, fewer if it is shorter. Raises OSError: the file cannot be read."""
        with self._lock:
            try:
                return os.pread(self._handle(path), end - start, start)
            except OSError:
                self._forget(path)  # a network file system's handle may be stale: the next read opens the file again
                raise

    def close(self) -> None:
        """Close all files."""
        _close_all(self._handles)

    def _handle(self, path: str) -> int:
        handle = self._handles.get(path)
        if handle is None:
            handle = self._handles[path] = open_regular(path)
            if len(self._handles) > OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
        else:
            self._handles.move_to_end(path)
        return handle

    def _forget(self, path: str) -> None:
        handle = self._handles.pop(path, None)
        if handle is not None:
            os.close(handle)


def _close_all(handles: OrderedDict[str, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


class ReadAhead:
    """Runs calls in up to `threads` daemon threads, in their order; a thread ends when no call waits.

    Unlike those of `ThreadPoolExecutor`, they do not delay the exit of the process while a server is silent. A stream
    that waits for its storage has a call per lane and bucket: too many for a thread each.
    """

    def __init__(self, threads: int) -> None:
        self._free, self._lock = threads, threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        """Start a call and return the future of its result."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append(partial(_settle, future, call))
            if self._free:
                threading.Thread(target=self._work, name="read-ahead", daemon=True).start()
                self._free -= 1
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._free += 1
                    return
                call = self._waiting.popleft()
            call()


def _settle(future: "Future[T]", call: Callable[[], T]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # raised again by `future.result()`
        future.set_exception(error)
