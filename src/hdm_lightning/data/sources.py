"""Sources of samples: where shards lie, which of them an index knows, and the samples of them that the rules accept."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.index import ShardRecord, index_file, load_index
from hdm_lightning.data.members import SampleTable
from hdm_lightning.data.storage import is_local
from hdm_lightning.errors import UserError

Rows = NDArray[np.int32]
State = tuple[int, int] | None
KEYS = ("urls", "weight", "index")


@dataclass(frozen=True)
class Source:
    """Shards that belong together.

    Attributes:
        urls: folders, shards (`…/0000.tar`) or brace patterns (`…/{0000..0099}.tar`), local or remote.
        weight: share of the samples that come from this source, relative to the other sources; None for its number
            of samples. Give it for all sources or for none.
        index: where the index lies, if not beside the shards.
    """

    urls: tuple[str, ...]
    weight: float | None = None
    index: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.urls, str):  # a lone address would pass for a sequence of letters
            object.__setattr__(self, "urls", (self.urls,))


def sources_from(value: Any, where: str) -> tuple[Source, ...]:
    """The sources that a plain value means.

    Args:
        value: a folder, shard, brace pattern or address; a list of them, which makes one source; or a list in which
            a source is a mapping of `urls`, `weight` and `index`.
        where: the value's key.

    Raises:
        UserError: it is none of these.
    """
    entries = [value] if isinstance(value, str | os.PathLike | Mapping) else value
    if not isinstance(entries, Sequence) or not entries:
        raise UserError("no source is given", where=where, hint="give a folder of shards")
    if all(isinstance(entry, str | os.PathLike) for entry in entries):
        return (Source(urls=tuple(map(_tidy, entries))),)
    return tuple(_source(entry, f"{where}[{number}]") for number, entry in enumerate(entries))


def _source(entry: Any, where: str) -> Source:
    if isinstance(entry, str | os.PathLike):
        return Source(urls=(_tidy(entry),))
    if not isinstance(entry, Mapping) or "urls" not in entry or set(entry) - set(KEYS):
        raise UserError(f"{entry!r} is no source", where=where, hint="give a folder, or {urls: …, weight: …}")
    urls = entry["urls"]
    several = [urls] if isinstance(urls, str | os.PathLike) else urls
    return Source(tuple(map(_tidy, several)), entry.get("weight"), entry.get("index"))


def _tidy(url: str | os.PathLike[str]) -> str:
    """A local path without `~` and `..`: a configuration may name what lies beside a folder not made yet."""
    text = os.fspath(url)
    return os.path.normpath(os.path.expanduser(text)) if is_local(text) else text


@dataclass(frozen=True)
class PlannedShard:
    """A shard and which of its usable samples the plan holds (all where `rows` is None)."""

    url: str
    record: ShardRecord
    rows: Rows | None = None

    @property
    def samples(self) -> int:
        """Planned samples of this shard."""
        return self.record.samples if self.rows is None else len(self.rows)

    def table(self) -> SampleTable:
        """Where the planned samples lie."""
        table = self.record.table()
        return table if self.rows is None else table.take(self.rows)

    def shapes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Height and width in pixels of the planned samples."""
        height, width = self.record.shapes()
        return (height, width) if self.rows is None else (height[self.rows], width[self.rows])

    def only(self, chosen: NDArray[np.bool_]) -> "PlannedShard":
        """The same shard with those of its planned samples that are chosen, bool (samples,)."""
        if chosen.all():
            return self
        rows = np.arange(self.record.samples, dtype=np.int32) if self.rows is None else self.rows
        return PlannedShard(self.url, self.record, rows[chosen])


def planned_shards(source: Source, crop: CropRules, resolution: int) -> Sequence[PlannedShard]:
    """The shards of a source with the samples that the crop rules accept; plans of one process share them.

    Raises:
        UserError: an index is missing or cannot be read, or no sample may be used.
    """
    limits = CropRules(min_size_px=crop.min_size_px, max_upscale=crop.max_upscale, max_aspect=crop.max_aspect)
    states = tuple(_state(place) for place in _places(source))
    return _planned(source, limits, crop.buckets is not None, resolution, states)


@lru_cache(maxsize=4)
def _planned(
    source: Source, limits: CropRules, only_known: bool, resolution: int, states: tuple[State, ...]
) -> tuple[PlannedShard, ...]:
    shards = []
    for url, record in resolve(source):
        shard = PlannedShard(url, record)
        height, width = shard.shapes()
        accepted = limits.accepts(height, width, resolution)
        shards.append(shard.only(accepted & (height > 0) if only_known else accepted))
    kept = tuple(shard for shard in shards if shard.samples)
    if not kept:
        raise UserError(
            "no sample of this source may be used",
            where=", ".join(source.urls),
            hint="look at `hdm-shards stats` and at the limits of data.crop (min_size_px, max_upscale, max_aspect)",
        )
    return kept


def source_weights(sources: Sequence[Source], planned: Sequence[Sequence[PlannedShard]]) -> list[float]:
    """The weight of each source: as given, or its number of samples.

    Raises:
        UserError: some sources have a positive weight and some have not.
    """
    given = [source.weight for source in sources if source.weight is not None]
    if not given:
        return [float(sum(shard.samples for shard in shards)) for shards in planned]
    if len(given) < len(sources) or min(given) <= 0:
        raise UserError(
            "some sources have a positive weight and some have not",
            where="data.sources",
            hint="give every source a positive weight, or none",
        )
    return given


def resolve(source: Source) -> list[tuple[str, ShardRecord]]:
    """Addresses and records of the shards of a source, in the order in which they are named.

    Raises:
        UserError: an index is missing, or does not know a shard that is named.
    """
    found: list[tuple[str, ShardRecord]] = []
    known = {place: known_shards(place, _state(place)) for place in _places(source)}
    for url in _addresses(source):
        place, records = _place(source, url), known[_place(source, url)]
        if not _is_shard(url):
            found += [(f"{url.rstrip('/')}/{record.name}", record) for record in records.values()]
        elif (name := url.rpartition("/")[2]) in records:
            found.append((url, records[name]))
        else:
            raise UserError("the index does not know this shard", where=url, hint=f"run `hdm-shards index {place}`")
    return found


@lru_cache(maxsize=16)
def known_shards(place: str, state: State) -> Mapping[str, ShardRecord]:
    """The records of an index by name; read once a process as long as a local file does not change."""
    return {record.name: record for record in load_index(place).shards}


def _addresses(source: Source) -> Iterator[str]:
    return (url for pattern in source.urls for url in expanded(pattern))


def _places(source: Source) -> list[str]:
    """Where the indices of a source lie."""
    return list(dict.fromkeys(_place(source, url) for url in _addresses(source)))


def _place(source: Source, url: str) -> str:
    return source.index or ((url.rpartition("/")[0] or ".") if _is_shard(url) else url)


def _state(place: str) -> State:
    """Size and time of change of a local index, None for a remote or missing one."""
    path = Path(index_file(place))
    if not is_local(place) or not path.is_file():
        return None
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def expanded(pattern: str) -> Iterator[str]:
    """The addresses that a brace pattern names.

    Raises:
        UserError: a brace is not closed.
    """
    try:
        yield from braceexpand(pattern)
    except ValueError as error:
        raise UserError(f"is no pattern ({error})", where=pattern, hint="close each brace: {0000..0099}.tar") from error


def _is_shard(url: str) -> bool:
    return url.endswith(".tar")
