"""Sources to the shards that a plan may read, and the samples of them that the rules accept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from hdm_lightning.data.config import Source, StreamConfig
from hdm_lightning.data.index import load_index
from hdm_lightning.data.records import SampleTable, ShardRecord
from hdm_lightning.errors import UserError

Rows = NDArray[np.int32]


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
        return table if self.rows is None else SampleTable(*(column[self.rows] for column in table))

    def only(self, chosen: NDArray[np.bool_]) -> "PlannedShard":
        """The same shard with those of its planned samples that are chosen, bool (samples,)."""
        if chosen.all():
            return self
        rows = np.arange(self.record.samples, dtype=np.int32) if self.rows is None else self.rows
        return PlannedShard(self.url, self.record, rows[chosen])


def planned_shards(source: Source, config: StreamConfig) -> list[PlannedShard]:
    """The shards of a source with the samples that the crop rules accept.

    Raises:
        UserError: an index is missing, or no sample may be used.
    """
    shards = [_accepted(PlannedShard(url, record), config) for url, record in resolve(source)]
    shards = [shard for shard in shards if shard.samples]
    if not shards:
        raise UserError(
            "no sample of this source may be used",
            where=", ".join(source.urls),
            hint="look at `hdm-shards stats` and at the limits of data.crop (min_size_px, max_upscale, max_aspect)",
        )
    return shards


def _accepted(shard: PlannedShard, config: StreamConfig) -> PlannedShard:
    table = shard.table()
    fine = config.crop.accepts(table.height, table.width, config.resolution)
    if config.crop.buckets is not None:
        fine &= table.height > 0
    return shard.only(fine)


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
    indices: dict[str, dict[str, ShardRecord]] = {}
    for url in (single for pattern in source.urls for single in expanded(pattern)):
        folder, name = (url.rpartition("/")[0] or ".", url.rpartition("/")[2]) if _is_shard(url) else (url, "")
        place = source.index or folder
        if place not in indices:
            indices[place] = {record.name: record for record in load_index(place).shards}
        records = indices[place]
        if not name:
            found += [(f"{folder.rstrip('/')}/{record.name}", record) for record in records.values()]
        elif name in records:
            found.append((url, records[name]))
        else:
            raise UserError("the index does not know this shard", where=url, hint=f"run `hdm-shards index {place}`")
    return found


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
