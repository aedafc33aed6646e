"""Samples of a set of shards for the page: found by words in their captions, shown, and cropped as in training."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.decode import load_upright
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.inspection import preview
from hdm_lightning.data.reader import LocalFiles
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.sample_table import Form, RawSample
from hdm_lightning.data.samples import Preparation
from hdm_lightning.data.shard_bytes import is_local, read_range
from hdm_lightning.data.shard_record import ShardRecord
from hdm_lightning.data.source_shards import resolve
from hdm_lightning.errors import UserError

THUMB_PX = 320
PATIENCE_S = 8.0
"""Seconds that a search runs before it reports how far it came."""
LARGEST_SAMPLE = 1 << 28
MOST_LOCATED = 300_000
"""Most positions in the order that are searched for those of a sample."""


class Address(NamedTuple):
    """A sample: number of its shard in the set, and its ordinal in the shard."""

    shard: int
    ordinal: int


@dataclass(frozen=True)
class Hit:
    """A sample that was found.

    Attributes:
        row: its position among all usable samples of the set, in the order of the shards.
        shard: the shard's name.
        captions: all of its captions.
        image: a thumbnail; None if the image cannot be decoded.
        fault: why it cannot be decoded.
    """

    address: Address
    row: int
    shard: str
    key: str
    captions: tuple[str, ...]
    image: Image.Image | None
    fault: str = ""

    @property
    def line(self) -> str:
        """The text below its thumbnail."""
        return self.captions[0] if self.captions else f"{self.key} (no caption)"


@dataclass(frozen=True)
class Found:
    """Hits, and how far the search came: `next_row` is None at the end of the set."""

    hits: tuple[Hit, ...]
    looked_at: int
    samples: int
    next_row: int | None

    def without_one(self) -> "Found":
        """Return the same after one of its samples was left out of the set, which moves later ones up by a row."""
        return replace(self, samples=self.samples - 1, next_row=None if self.next_row is None else self.next_row - 1)


class ShardSet:
    """A set of indexed shards.

    Args:
        place: folder or pattern, as named when the page was started.

    Raises:
        UserError: there is no index, or the samples hold latents.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        Plan(self.stream(64)).require_images("--shards")
        self.shards: list[tuple[str, ShardRecord]] = resolve(Source((place,)))
        self.samples = sum(record.samples for _, record in self.shards)
        self._files, self._rules = LocalFiles(), CaptionRules(allow_missing=True)

    def search(self, words: str, *, start: int = 0, limit: int = 24, patience_s: float = PATIENCE_S) -> Found:
        """Find samples, from a row on, whose captions or key contain all the words; without words, find all samples.

        In a large set the search stops after a while, and `next_row` says where to continue.
        """
        wanted, hits, row = words.casefold().split(), [], start - 1
        began = time.monotonic()
        for row, address, record, raw in self._rows(start):
            if isinstance(raw, RawSample):
                texts = self._captions(raw)
                if all(word in " ".join((*texts, raw.key)).casefold() for word in wanted):
                    hits.append(_hit(address, row, record, raw, texts))
            elif not wanted:
                hits.append(Hit(address, row, record.name, f"#{address.ordinal}", (), None, str(raw)))
            if len(hits) >= limit or time.monotonic() - began > patience_s:
                break
        after = row + 1
        return Found(tuple(hits), after - start, self.samples, after if after < self.samples else None)

    def raw(self, address: Address) -> RawSample:
        """Return a sample as it is in its shard.

        Raises:
            UserError: there is no such sample, or it is left out.
        """
        if not 0 <= address.shard < len(self.shards):
            raise UserError("there is no such shard", where=self.place, hint="search again: the set has changed")
        url, record = self.shards[address.shard]
        rows = record.table()
        for ordinal, begin, size, form in zip(
            rows.ordinal.tolist(), rows.start.tolist(), rows.size.tolist(), rows.forms(), strict=True
        ):
            if ordinal == address.ordinal:
                raw = self._read(url, begin, size, form)
                if isinstance(raw, SampleFault):
                    raise UserError(str(raw), where=f"{record.name} sample {ordinal}", hint="run hdm-shards verify")
                return raw
        raise UserError("there is no such sample, or it is left out", where=record.name, hint="search again")

    def appearances(self, address: Address, config: StreamConfig, count: int) -> list[tuple[Image.Image, str]]:
        """Return the first views of a sample in a training with this stream, each with its position in the order.

        Raises:
            UserError: the set is too large to search for the positions, or the sample is not in the plan.
        """
        plan = Plan(config)
        if plan.samples * count > MOST_LOCATED:
            what = f"a set of {plan.samples:,} samples is too large to search for the positions of this one"
            raise UserError(what, where=self.place, hint="use 'Order from here' instead")
        preparation = Preparation(config, plan, _words, training=True)
        name = self.shards[address.shard][1].name
        keys = _keys_of(plan, name, address.ordinal)
        places = (place for place in range(plan.samples * (count + 1)) if plan.locate(place).key in keys)
        shown = [preview(preparation.sample(place)) for place in islice(places, count)] if keys else []
        if not shown:
            hint = "compare its size and shape with the limits of data.crop"
            raise UserError("no training will see this sample", where=name, hint=hint)
        return shown

    def order(self, config: StreamConfig, start: int, count: int) -> list[tuple[Image.Image, str]]:
        """Return the samples that a training with this stream sees from a position on, as `hdm-shards show` does."""
        preparation = Preparation(config, Plan(config), _words, training=True)
        return [preview(preparation.sample(place)) for place in range(start, start + count)]

    def stream(
        self, resolution: int, *, seed: int = 0, stage: str = "", flip: bool = False, drop: float = 0.1
    ) -> StreamConfig:
        """Return the stream of a training on this set alone."""
        return StreamConfig(
            sources=(Source((self.place,)),),
            resolution=resolution,
            context_length=256,
            seed=seed,
            stage=stage,
            crop=CropRules(flip=flip),
            captions=CaptionRules(drop=drop),
            max_bad_share=1.0,
        )

    def _rows(self, start: int) -> Iterator[tuple[int, Address, ShardRecord, RawSample | SampleFault]]:
        before = 0
        for number, (url, record) in enumerate(self.shards):
            first, before = max(0, start - before), before + record.samples
            if first >= record.samples:
                continue
            rows = record.table()
            columns = (rows.ordinal.tolist(), rows.start.tolist(), rows.size.tolist(), rows.forms())
            for offset, (ordinal, begin, size, form) in islice(enumerate(zip(*columns, strict=True)), first, None):
                row = before - record.samples + offset
                yield row, Address(number, ordinal), record, self._read(url, begin, size, form)

    def _read(self, url: str, begin: int, size: int, form: Form) -> RawSample | SampleFault:
        if size > LARGEST_SAMPLE:
            return SampleFault(f"sample too large: {size} bytes")
        try:
            read = self._files.read if is_local(url) else read_range
            return form.cut(read(url, begin, begin + size))
        except SampleFault as fault:
            return fault
        except OSError as error:
            return SampleFault(f"unreadable shard: {error.strerror or error}")

    def _captions(self, raw: RawSample) -> tuple[str, ...]:
        try:
            return tuple(each.text for each in self._rules.all_of(raw.members))
        except SampleFault:
            return ()


def whole(raw: RawSample) -> Image.Image:
    """Return the whole image of a sample, upright.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        return load_upright(raw.image())
    except SampleFault as fault:
        raise UserError(str(fault), where=raw.key, hint="find them all with hdm-shards verify --decode") from fault


def is_markable(place: str) -> bool:
    """Return whether the index of a set can be written: only that of a local folder can."""
    return is_local(place) and Path(place).is_dir()


def _hit(address: Address, row: int, record: ShardRecord, raw: RawSample, texts: Sequence[str]) -> Hit:
    try:
        image, fault = load_upright(raw.image()), ""
        image.thumbnail((THUMB_PX, THUMB_PX))
    except SampleFault as error:
        image, fault = None, str(error)
    return Hit(address, row, record.name, raw.key, tuple(texts), image, fault)


def _keys_of(plan: Plan, shard: str, ordinal: int) -> set[tuple[int, int, int]]:
    """Return the keys that a plan's order has for a sample: one for each part that contains it."""
    return {
        (number, place, rank)
        for number, part in enumerate(plan.parts)
        for place, planned in enumerate(part.shards)
        if planned.record.name == shard
        for rank in np.flatnonzero(planned.table().ordinal == ordinal).tolist()
    }


def _words(caption: str) -> tuple[list[int], int]:
    count = len(caption.split())
    return [0] * count, count
