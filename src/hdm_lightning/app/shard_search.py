"""Samples of a set of shards for the page: found by words, cropped as in training, and left out by hand."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from PIL import Image

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.decode import load_upright
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.index import INDEX_NAME, load_index, write_index
from hdm_lightning.data.inspection import preview
from hdm_lightning.data.reader import LocalFiles
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.data.sample_plan import Plan, PlannedShard
from hdm_lightning.data.sample_table import RawSample
from hdm_lightning.data.samples import Preparation
from hdm_lightning.data.shard_bytes import is_local
from hdm_lightning.data.shard_record import ShardRecord
from hdm_lightning.data.verification import Problem, leave_out
from hdm_lightning.datasets.shard_work import Job, jobs_of, read_sample, shards_in
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

THUMB_PX = 320
PATIENCE_S = 8.0
"""Seconds that a search runs before it reports how far it came."""
LARGEST_SAMPLE = 1 << 28
MOST_LOCATED = 300_000
"""Most positions in the order that are searched for those of a sample."""
BY_HAND = "marked by hand"
LONGEST_REASON = 200
MOST_MARKS = 500
_WRITING = Lock()


class Address(NamedTuple):
    """A sample: number of its shard in the set, and its ordinal in the shard."""

    shard: int
    ordinal: int


@dataclass(frozen=True)
class Hit:
    """A sample that was found: the name of its shard, its key and captions, and a thumbnail, or None if its image
    cannot be decoded."""

    address: Address
    shard: str
    key: str
    captions: tuple[str, ...]
    image: Image.Image | None

    @property
    def line(self) -> str:
        """The text below its thumbnail."""
        return self.captions[0] if self.captions else f"{self.key} (no caption)"


@dataclass(frozen=True)
class Found:
    """Hits, and how far the search came: `next_row` is None at the end of the set."""

    hits: tuple[Hit, ...]
    looked_at: int
    next_row: int | None

    def without_one(self) -> "Found":
        """Return the same after one of its samples was left out of the set, which moves later ones up by a row."""
        return replace(self, next_row=None if self.next_row is None else self.next_row - 1)


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
        self.shards = shards_in(place)
        self.samples = sum(shard.samples for shard in self.shards)
        self._files, self._rules = LocalFiles(), CaptionRules(allow_missing=True)

    def search(self, words: str, *, start: int = 0, limit: int = 24, patience_s: float = PATIENCE_S) -> Found:
        """Find samples, from a row on, whose captions or key contain all the words; without words, find all samples.

        In a large set the search stops after a while, and `next_row` says where to continue.
        """
        wanted, hits, looked_at = words.casefold().split(), [], 0
        began = time.monotonic()
        for address, record, raw in self._rows(start):
            looked_at += 1
            if isinstance(raw, RawSample):
                texts = self._captions(raw)
                if all(word in " ".join((*texts, raw.key)).casefold() for word in wanted):
                    hits.append(Hit(address, record.name, raw.key, texts, _thumbnail(raw)))
            elif not wanted:
                hits.append(Hit(address, record.name, f"#{address.ordinal}", (), None))
            if len(hits) >= limit or time.monotonic() - began > patience_s:
                break
        after = start + looked_at
        return Found(tuple(hits), looked_at, after if after < self.samples else None)

    def raw(self, address: Address) -> RawSample:
        """Return a sample as it is in its shard.

        Raises:
            UserError: there is no such sample, or it is left out.
        """
        if not 0 <= address.shard < len(self.shards):
            raise UserError("there is no such shard", where=self.place, hint="search again: the set has changed")
        shard = self.shards[address.shard]
        job = next((job for job in jobs_of(shard) if job.ordinal == address.ordinal), None)
        if job is None:
            what = "there is no such sample, or it is left out"
            raise UserError(what, where=shard.record.name, hint="search again")
        raw = self._read(shard, job)
        if isinstance(raw, SampleFault):
            where = f"{shard.record.name} sample {job.ordinal}"
            raise UserError(str(raw), where=where, hint="run hdm-shards verify")
        return raw

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
        name = self.shards[address.shard].record.name
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

    def stream(self, resolution: int, *, seed: int = 0, stage: str = "", flip: bool = False) -> StreamConfig:
        """Return the stream of a training on this set alone."""
        return StreamConfig(
            sources=(Source((self.place,)),),
            resolution=resolution,
            context_length=256,
            seed=seed,
            stage=stage,
            crop=CropRules(flip=flip),
            max_bad_share=1.0,
        )

    def _rows(self, start: int) -> Iterator[tuple[Address, ShardRecord, RawSample | SampleFault]]:
        before = 0
        for number, shard in enumerate(self.shards):
            first, before = max(0, start - before), before + shard.samples
            if first < shard.samples:
                for job in jobs_of(shard)[first:]:
                    yield Address(number, job.ordinal), shard.record, self._read(shard, job)

    def _read(self, shard: PlannedShard, job: Job) -> RawSample | SampleFault:
        if job.end - job.start > LARGEST_SAMPLE:
            return SampleFault(f"sample too large: {job.end - job.start} bytes")
        try:
            return read_sample(self._files, shard.url, job)
        except SampleFault as fault:
            return fault
        except UserError as error:
            return SampleFault(error.what)

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


def _thumbnail(raw: RawSample) -> Image.Image | None:
    try:
        image = load_upright(raw.image())
    except SampleFault:
        return None
    image.thumbnail((THUMB_PX, THUMB_PX))
    return image


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


def mark(place: str, shard: str, ordinal: int, key: str, reason: str) -> int:
    """Leave a sample out of a set, which changes the order of the others; return the number of remaining samples.

    Raises:
        UserError: the set is not a local folder, the sample is missing or already left out, or there is no reason.
    """
    _require_markable(place)
    words = " ".join(reason.split())[:LONGEST_REASON]
    if not words:
        raise UserError("is empty", where="reason", hint="say in a word or two what is wrong with the sample")
    with _WRITING:
        record = next((each for each in load_index(place).shards if each.name == shard), None)
        if record is None or not 0 <= ordinal < record.count or ordinal in record.skip:
            raise UserError(f"sample {ordinal} is missing or already left out", where=shard, hint="search again")
        return leave_out(place, [Problem(shard, in_one_line(f"{BY_HAND}: {words}"), ordinal, key)]).samples


def unmark(place: str, shard: str, ordinal: int) -> int:
    """Restore a sample that was left out by hand; return the number of samples.

    Raises:
        UserError: it was not left out by hand.
    """
    _require_markable(place)
    with _WRITING:
        index = load_index(place)
        record = next((each for each in index.shards if each.name == shard), None)
        if record is None or not record.skip.get(ordinal, "").startswith(BY_HAND):
            what = f"sample {ordinal} was not left out by hand"
            raise UserError(what, where=shard, hint="run `hdm-shards index` to remove all marks")
        skip = {each: why for each, why in record.skip.items() if each != ordinal}
        restored = replace(record, skip=skip, samples=record.samples + 1)
        shards = tuple(restored if each is record else each for each in index.shards)
        write_index(replace(index, shards=shards), Path(place) / INDEX_NAME)
        return sum(each.samples for each in shards)


def left_out(place: str) -> Sequence[tuple[str, int, str]]:
    """Return shard, ordinal and reason of the samples left out, those marked by hand first."""
    found = [(record.name, *each) for record in load_index(place).shards for each in record.skip.items()]
    return sorted(found, key=lambda each: not each[2].startswith(BY_HAND))[:MOST_MARKS]


def _require_markable(place: str) -> None:
    if not is_markable(place):
        what = "is not a local folder, so its index cannot be written"
        raise UserError(what, where=place, hint="mark samples in a local copy of the set")
