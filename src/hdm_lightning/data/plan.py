"""Sources to planned shards to one endless order of samples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.config import Source, StreamConfig
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.index import Index, SampleTable, ShardRecord, load_index
from hdm_lightning.data.mixing import Mixture
from hdm_lightning.data.order import ShardOrder, Window
from hdm_lightning.errors import UserError


@dataclass(frozen=True)
class PlannedShard:
    """A shard and which of its usable samples the plan holds (all where `rows` is None)."""

    url: str
    record: ShardRecord
    rows: NDArray[np.int32] | None

    @property
    def samples(self) -> int:
        """Planned samples of this shard."""
        return self.record.samples if self.rows is None else len(self.rows)

    def table(self) -> SampleTable:
        """Where the planned samples lie."""
        table = self.record.table()
        return table if self.rows is None else SampleTable(*(column[self.rows] for column in table))


class Place(NamedTuple):
    """Where the sample of a position is found: a part of the plan, a window of that part, a place in the window."""

    part: int
    window: Window
    place: int


class Part(NamedTuple):
    """Shards with an order of their own: a source, or the samples of a source that share a bucket."""

    shards: tuple[PlannedShard, ...]
    order: ShardOrder
    source: int


class Plan:
    """The endless order of all samples of a stream.

    Args:
        config: the stream; its indices are read here.

    Raises:
        UserError: an index is missing or no sample may be used.
    """

    def __init__(self, config: StreamConfig) -> None:
        if not config.sources:
            raise UserError("there is no source", where="data.sources", mend="name at least one folder of shards")
        per_source = [_planned(source, config) for source in config.sources]
        weights = _weights(config.sources, per_source)
        self.samples = sum(shard.samples for shards in per_source for shard in shards)
        self.parts = tuple(
            Part(tuple(shards), _order(shards, number, config), number) for number, shards in enumerate(per_source)
        )
        self._mixture = Mixture(weights, config.lanes)
        self.fingerprint = _fingerprint(per_source, weights, config)

    def locate(self, position: int) -> Place:
        """Where the sample of a global position is found."""
        part, own = self._mixture.locate(position)
        window, place = self.parts[part].order.window_of(own)
        return Place(part, window, place)

    def shape_at(self, position: int, resolution: int) -> tuple[int, int]:
        """Height and width of the crop at a position."""
        return resolution, resolution


def _planned(source: Source, config: StreamConfig) -> list[PlannedShard]:
    shards = [_restricted(url, record, config.crop, config.resolution) for url, record in resolve(source)]
    shards = [shard for shard in shards if shard.samples]
    if not shards:
        raise UserError(
            "no sample of this source may be used",
            where=", ".join(source.urls),
            mend="look at `hdm-shards stats` and at the limits of data.crop (min_size_px, max_upscale, max_aspect)",
        )
    return shards


def _restricted(url: str, record: ShardRecord, rules: CropRules, resolution: int) -> PlannedShard:
    table = record.table()
    fine = rules.accepts(table.height, table.width, resolution)
    rows = None if fine.all() else np.flatnonzero(fine).astype(np.int32)
    return PlannedShard(url, record, rows)


def _order(shards: Sequence[PlannedShard], number: int, config: StreamConfig) -> ShardOrder:
    stage = config.stage if number == 0 else f"{config.stage}#{number}"
    counts = [shard.samples for shard in shards]
    return ShardOrder(counts, seed=config.seed, stage=stage, lanes=config.lanes, window=config.window)


def _weights(sources: Sequence[Source], planned: Sequence[Sequence[PlannedShard]]) -> list[float]:
    given = [source.weight for source in sources if source.weight is not None]
    if not given:
        return [float(sum(shard.samples for shard in shards)) for shards in planned]
    if len(given) < len(sources) or min(given) <= 0:
        raise UserError(
            "some sources have a positive weight and some have not",
            where="data.sources",
            mend="give every source a positive weight, or none",
        )
    return given


def _fingerprint(planned: Sequence[Sequence[PlannedShard]], weights: Sequence[float], config: StreamConfig) -> str:
    """What two runs must share for their orders to be the same."""
    digest = hashlib.sha256(repr((list(weights), config.seed, config.stage, config.lanes, config.window)).encode())
    for shards in planned:
        for shard in shards:
            digest.update(f"{shard.record.name} {shard.samples} {shard.record.sha256}\n".encode())
    return digest.hexdigest()[:16]


def resolve(source: Source) -> list[tuple[str, ShardRecord]]:
    """The shards of a source with their records, in the order in which they are named.

    Raises:
        UserError: an index is missing, or does not know a shard that is named.
    """
    from braceexpand import braceexpand  # noqa: PLC0415 (only here)

    found: list[tuple[str, ShardRecord]] = []
    indices: dict[str, Index] = {}
    for url in (single for pattern in source.urls for single in braceexpand(pattern)):
        folder, name = url.rpartition("/")[::2] if url.endswith(".tar") else (url, "")
        place = source.index or folder or "."
        if place not in indices:
            indices[place] = load_index(place)
        index = indices[place]
        if not name:
            found += [(f"{folder.rstrip('/')}/{record.name}", record) for record in index.shards]
            continue
        records = [record for record in index.shards if record.name == name]
        if not records:
            raise UserError("the index does not know this shard", where=url, mend=f"run `hdm-shards index {place}`")
        found.append((url, records[0]))
    return found
