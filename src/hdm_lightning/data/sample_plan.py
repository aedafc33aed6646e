"""The endless order of all samples of a stream: the shards of its sources, their mixture and optional buckets."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.crops import AspectCounts, Buckets, CropRules, Shape
from hdm_lightning.data.index_columns import Integers, let_go
from hdm_lightning.data.index_report import no_samples
from hdm_lightning.data.order import BlockOrder, Mixture, ShardOrder, Window
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.data.sample_table import SampleTable
from hdm_lightning.data.shard_record import ShardRecord
from hdm_lightning.data.source_shards import State, at_resolution, common_latents, places_of, resolve, state_of
from hdm_lightning.errors import UserError

Mask = NDArray[np.bool_]
Choice = Callable[[Integers, Integers], Mask]
"""Chooses samples of a shard by the height and width in pixels of all usable ones; (n,), (n,) -> (n,)."""

SHARDS_MAPPED = 1 << 10
"""Number of shards after which the mapped pages of an index's columns are released."""


@dataclass(frozen=True)
class Accepted:
    """The samples that crop rules accept at a resolution; `only_known` leaves out those of unknown size."""

    limits: CropRules
    resolution: int
    only_known: bool

    def __call__(self, height: Integers, width: Integers) -> Mask:
        """Return which samples are accepted; see `Choice`."""
        accepted = self.limits.accepts(height, width, self.resolution)
        return accepted & (height > 0) if self.only_known else accepted


@dataclass(frozen=True)
class OfShape:
    """The accepted samples whose aspect ratio is nearest to one of the shapes in use."""

    accepted: Accepted
    buckets: Buckets
    shapes: tuple[Shape, ...]
    shape: int

    def __call__(self, height: Integers, width: Integers) -> Mask:
        """Return which samples are nearest to the shape; see `Choice`."""
        chosen = self.accepted(height, width)
        chosen[chosen] = self.buckets.nearest(height[chosen], width[chosen], self.shapes) == self.shape
        return chosen


@dataclass(frozen=True)
class PlannedShard:
    """A shard and those of its usable samples that a plan includes.

    They are not stored but chosen on every request: for hundreds of millions of samples, lists would take gigabytes.
    """

    url: str
    record: ShardRecord
    samples: int
    """Number of planned samples."""
    choice: Choice | NDArray[np.int32] | None = None
    """Chooses them, or lists them by row; None for all."""

    @classmethod
    def whole(cls, url: str, record: ShardRecord) -> "PlannedShard":
        """Return a shard with all its usable samples."""
        return cls(url, record, record.samples)

    def rows(self) -> NDArray[Any] | slice:
        """Return an index of the planned samples among the usable ones: rows, a mask or a slice."""
        if callable(self.choice):
            return self.choice(*self.record.shapes())
        return slice(None) if self.choice is None else self.choice

    def table(self) -> SampleTable:
        """Return the locations of the planned samples."""
        return self.record.table().take(self.rows())

    def shapes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return height and width in pixels of the planned samples."""
        height, width = self.record.shapes()
        rows = self.choice(height, width) if callable(self.choice) else self.rows()
        return height[rows], width[rows]

    def only(self, chosen: Mask) -> "PlannedShard":
        """Return the shard with only the chosen ones of its planned samples, bool (samples,)."""
        if chosen.all():
            return self
        rows = np.arange(self.record.samples, dtype=np.int32)[self.rows()][chosen]
        return replace(self, samples=len(rows), choice=rows)


class PlannedSource(NamedTuple):
    """The shards of a source with the samples that the crop rules accept."""

    shards: tuple[PlannedShard, ...]
    images: AspectCounts  # of all its planned samples; empty without buckets
    nearest: tuple[Integers, ...]  # for each shard, how many samples are nearest to each of the buckets' shapes


def planned_source(source: Source, crop: CropRules, resolution: int) -> PlannedSource:
    """Return the samples of a source that the crop rules accept; plans in one process share them.

    Raises:
        UserError: an index is missing or cannot be read, or no sample can be used.
    """
    states = tuple(state_of(place) for place in places_of(source))
    shapes = () if crop.buckets is None else crop.buckets.shapes(resolution)
    return _planned(source, _limits(crop), shapes, resolution, states)


def _limits(crop: CropRules) -> CropRules:
    """Return only those of the rules that decide which images may be used."""
    return CropRules(min_size_px=crop.min_size_px, max_upscale=crop.max_upscale, max_aspect=crop.max_aspect)


def _sparing(shards: Iterable[PlannedShard]) -> Iterator[PlannedShard]:
    """Yield the shards, releasing their mapped columns as it goes to keep the memory of the process small."""
    for number, shard in enumerate(shards, 1):
        yield shard
        if number % SHARDS_MAPPED == 0:
            let_go(shard.record.height)


@lru_cache(maxsize=4)
def _planned(
    source: Source, limits: CropRules, shapes: tuple[Shape, ...], resolution: int, states: tuple[State, ...]
) -> PlannedSource:
    kept, images, nearest = [], AspectCounts(shapes), []
    resolved = resolve(source)
    if not any(record.samples for _, record in resolved):
        raise no_samples((record for _, record in resolved), ", ".join(source.urls))
    accepted = Accepted(limits, resolution, only_known=bool(shapes))
    for shard in _sparing(PlannedShard.whole(url, record) for url, record in resolved):
        height, width = shard.shapes()
        chosen = accepted(height, width)
        if count := int(np.count_nonzero(chosen)):
            kept.append(shard if count == shard.samples else replace(shard, samples=count, choice=accepted))
            if shapes:
                nearest.append(images.add(height[chosen], width[chosen]))
    if not kept:
        raise UserError(
            "no sample of this source can be used: all images are outside the limits of data.crop",
            where=", ".join(source.urls),
            hint="relax data.crop.min_size_px, data.crop.max_upscale or data.crop.max_aspect",
        )
    return PlannedSource(tuple(kept), images, tuple(nearest))


def source_weights(sources: Sequence[Source], planned: Sequence[Sequence[PlannedShard]]) -> list[float]:
    """Return the weight of each source: as given, or its number of samples.

    Raises:
        UserError: only some of the sources have a positive weight.
    """
    given = [source.weight for source in sources if source.weight is not None]
    if not given:
        return [float(sum(shard.samples for shard in shards)) for shards in planned]
    if len(given) < len(sources) or min(given) <= 0:
        raise UserError(
            "only some of the sources have a positive weight",
            where="data.train",
            hint="give all sources a positive weight, or leave all weights out",
        )
    return given


class Place(NamedTuple):
    """Where to find the sample of a position."""

    part: int
    shard: int
    """Number of the shard within the part."""
    rank: int
    """Rank among the planned samples of the shard."""
    window: Window
    place: int
    """Index of the sample within the window."""

    @property
    def key(self) -> tuple[int, int, int]:
        """Identifier of the sample within the plan."""
        return self.part, self.shard, self.rank


class Part(NamedTuple):
    """Shards with their own order: a source, or the samples of a source that share a bucket."""

    shards: tuple[PlannedShard, ...]
    order: ShardOrder


class _Mixed(NamedTuple):
    """The parts that share a crop shape, mixed by weight."""

    shape: Shape
    parts: tuple[int, ...]
    mixture: Mixture
    samples: int


class Plan:
    """The endless order of all samples of a stream.

    Args:
        config: the stream; its indices are read here.

    Attributes:
        samples: number of samples per pass.
        sources: the sources at the stream's resolution.
        latents: format of the latents that the samples have instead of images; None for images.
        parts: shards with their own order.
        fingerprint: hash of the planned samples and settings; two plans with the same one have the same order.

    Raises:
        UserError: an index is missing, or no sample can be used.
    """

    def __init__(self, config: StreamConfig) -> None:
        if not config.sources:
            raise UserError("no source is given", where="data.train", hint="name at least one folder of shards")
        self.sources = places = [at_resolution(source, config.resolution) for source in config.sources]
        self.latents = common_latents(places)
        planned = [planned_source(source, config.crop, config.resolution) for source in places]
        sources = [each.shards for each in planned]
        weights = source_weights(config.sources, sources)
        self.samples = sum(shard.samples for shards in sources for shard in shards)
        self.fingerprint = _fingerprint(sources, weights, config)
        self.parts: list[Part] = []
        self._blocks: BlockOrder | None = None
        if config.crop.buckets is None:
            square = (config.resolution, config.resolution)
            self._mixed = [self._mix(square, sources, weights, config)]
        else:
            self._mixed = self._mix_buckets(config.crop.buckets, planned, weights, config)

    def locate(self, position: int) -> Place:
        """Return where to find the sample at a global position."""
        bucket, own = self._bucket(position)
        mixed = self._mixed[bucket]
        number, own = mixed.mixture.locate(own)
        part = mixed.parts[number]
        window, place = self.parts[part].order.window_of(own)
        return Place(part, int(window.shards[place]), int(window.ranks[place]), window, place)

    def shape_at(self, position: int) -> Shape:
        """Return height and width in pixels of the crop at a position."""
        return self._mixed[self._bucket(position)[0]].shape

    @property
    def shapes(self) -> dict[Shape, int]:
        """Number of samples per pass for each crop shape."""
        return {mixed.shape: mixed.samples for mixed in self._mixed}

    def require_batches(self, samples: int, start: int) -> None:
        """Check that every micro-batch of `samples` samples over all ranks has a single crop shape.

        Raises:
            UserError: a block of a bucket would end inside a micro-batch.
        """
        if self._blocks is not None and (self._blocks.block % samples or start % samples):
            raise UserError(
                f"a bucket's block of {self._blocks.block} samples, starting at sample {start}, is not a whole "
                f"number of micro-batches of {samples} samples over all ranks",
                where="data.crop.buckets",
                hint=f"make the batch size of a step (in training, the stage's), which is the block, a multiple of "
                f"{samples}, or change the batch size per device",
            )

    def require_images(self, where: str) -> None:
        """Raise UserError, naming the key or option `where`, if the samples have latents instead of images."""
        if self.latents is not None:
            what = f"these shards contain latents of {self.latents.name}, but images are needed here"
            raise UserError(what, where=where, hint="name the image shards that they were encoded from")

    def _bucket(self, position: int) -> tuple[int, int]:
        return (0, position) if self._blocks is None else self._blocks.locate(position)

    def _mix(
        self, shape: Shape, sources: Sequence[Sequence[PlannedShard]], weights: Sequence[float], config: StreamConfig
    ) -> _Mixed:
        first, used = len(self.parts), [weight for weight, shards in zip(weights, sources, strict=True) if shards]
        samples = 0
        for number, shards in enumerate(sources):
            if shards:
                counts = [shard.samples for shard in shards]
                samples += sum(counts)
                bucket = "" if config.crop.buckets is None else f"{shape[0]}x{shape[1]}"
                stage = f"{config.stage}/{number}/{bucket}"
                order = ShardOrder(counts, seed=config.seed, stage=stage, lanes=config.lanes, window=config.window)
                self.parts.append(Part(tuple(shards), order))
        return _Mixed(shape, tuple(range(first, len(self.parts))), Mixture(used, config.lanes), samples)

    def _mix_buckets(
        self,
        buckets: Buckets,
        sources: Sequence[PlannedSource],
        weights: Sequence[float],
        config: StreamConfig,
    ) -> list[_Mixed]:
        """Return one mixture per bucket; the weights of the sources determine a bucket's share of a pass."""
        parted = _parted(config, buckets, sources)
        totals = [sum(shard.samples for shard in source.shards) for source in sources]
        unit = self.samples / sum(weights)
        mixed, sizes = [], []
        for shape, per_source in parted.items():
            own = [sum(shard.samples for shard in shards) for shards in per_source]
            shares = [weight * part / total for weight, part, total in zip(weights, own, totals, strict=True)]
            mixed.append(self._mix(shape, per_source, shares, config))
            sizes.append(max(buckets.block, round(sum(shares) * unit)))
        self._blocks = BlockOrder(sizes, block=buckets.block, seed=config.seed, stage=config.stage)
        return mixed


def _parted(
    config: StreamConfig, buckets: Buckets, sources: Sequence[PlannedSource]
) -> dict[Shape, list[list[PlannedShard]]]:
    """Return, for each shape in use, the shards of each source with the samples of that shape."""
    images = AspectCounts(buckets.shapes(config.resolution))
    for each in sources:
        images.include(each.images)
    shapes = buckets.shapes_in_use(images)
    counts = [each.nearest if shapes == images.shapes else _nearest(each.shards, shapes) for each in sources]
    accepted = Accepted(_limits(config.crop), config.resolution, only_known=True)
    parted: dict[Shape, list[list[PlannedShard]]] = {shape: [[] for _ in sources] for shape in shapes}
    for source, per_shard in enumerate(counts):
        for shard, of_shapes in zip(sources[source].shards, per_shard, strict=True):
            for number, (shape, count) in enumerate(zip(shapes, of_shapes.tolist(), strict=True)):
                if count:
                    choice = shard.choice if count == shard.samples else OfShape(accepted, buckets, shapes, number)
                    parted[shape][source].append(replace(shard, samples=count, choice=choice))
    return parted


def _nearest(shards: Iterable[PlannedShard], shapes: Sequence[Shape]) -> Sequence[Integers]:
    """Return how many of each shard's planned samples are nearest to each shape."""
    images = AspectCounts(shapes)
    return [images.add(*shard.shapes()) for shard in _sparing(shards)]


def _fingerprint(sources: Sequence[Sequence[PlannedShard]], weights: Sequence[float], config: StreamConfig) -> str:
    # Which images share a bucket also depends on the resolution.
    buckets = config.crop.buckets and (config.crop.buckets, config.resolution)
    settings = (list(weights), config.seed, config.stage, config.lanes, config.window, buckets)
    digest = hashlib.sha256(repr(settings).encode())
    for shards in sources:
        for shard in shards:
            digest.update(f"{shard.record.name} {shard.samples} {shard.record.sha256}\n".encode())
    return digest.hexdigest()[:16]
