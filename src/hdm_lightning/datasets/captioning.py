"""Copy shards of images with captions by a model added to the records; samples, keys and order stay the same.

A caption is added to the record's list `captions` as `{"text", "kind", "model", "prompt"}`. Existing captions stay;
those under `caption` move into that list, as training reads only the first of the two keys and would miss them.
The originals are only read. An interrupted call resumes at the batch where it stopped: until a shard is written, its
captions so far are in a journal next to it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from hdm_lightning.data.alpha_masks import shrunk
from hdm_lightning.data.captions import (
    MAX_CAPTION_BYTES,
    MAX_RECORD_BYTES,
    CaptionRules,
    captions_under,
    clean,
    is_blank,
    parse_record,
)
from hdm_lightning.data.decode import load_upright
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.index import Index
from hdm_lightning.data.reader import LocalFiles
from hdm_lightning.data.sample_plan import PlannedShard
from hdm_lightning.data.sample_table import RawSample
from hdm_lightning.data.scanning import index_shards, note_scanned, scan_shard
from hdm_lightning.data.shard_record import ShardRecord
from hdm_lightning.datasets.build import Pair
from hdm_lightning.datasets.journal import Journal, write_rejected
from hdm_lightning.datasets.shard_work import (
    Job,
    ahead,
    alone_in,
    digest_of,
    jobs_of,
    read_sample,
    require_apart,
    require_images,
    shards_in,
    worked_off,
)
from hdm_lightning.datasets.writer import Field, write_shard
from hdm_lightning.errors import UserError, first_line
from hdm_lightning.json_files import typed
from hdm_lightning.whole_files import append_line, read_lines, remove_leftovers

JOURNAL = "captions.jsonl"
FIRST = 16
"""Number of first images of which a model must describe at least one; otherwise it does not follow the prompt."""

BATCHES_AHEAD = 1
MODEL_FAULTS = (ValueError, RuntimeError, TypeError, LookupError, AssertionError, ArithmeticError)
"""Errors that models and processors raise for images they cannot handle, such as a strip one pixel high."""

Describe = Callable[[Sequence[Image.Image], str], Sequence[tuple[str, bool]]]
"""RGB images and a prompt to the caption of each, and whether it was cut off."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are made.

    Attributes:
        start: makes the model for a device, given by name; must be picklable if there are several devices.
        model: its name, recorded with each caption.
        fingerprint: everything else about the model, and how it is run, that affects its captions.
        prompts: by kind of caption.
        batch_size: images described at once.
        max_side_px: longest side of the images shown to the model; larger ones are shrunk.
        devices: `cuda:0`, `cpu`, …: one process each.
        threads: threads that decode images, per process.
    """

    start: Callable[[str], Describe]
    model: str
    fingerprint: str
    prompts: Mapping[str, str]
    batch_size: int = 8
    max_side_px: int = 1024
    devices: tuple[str, ...] = ("cpu",)
    threads: int = 1


class Summary(NamedTuple):
    """The result for a shard: samples, captions by kind, how many were cut off, and (key, reason) of faults."""

    samples: int
    captions: dict[str, int]
    cut: int
    faults: list[Pair]


class _Said(NamedTuple):
    """The result for an image: captions by kind, the kinds that were cut off, and (kind, reason) of captions that
    failed; the kind is empty if all of them did."""

    said: dict[str, str]
    cut: list[str]
    faults: list[Pair]


class CaptionedSet:
    """The shards of a source with added captions.

    Args:
        place: folder, shard or pattern of indexed shards of images.
        out: folder for the new shards.
        options: how captions are made.

    Raises:
        UserError: the shards cannot be used, or the folder holds something else.
    """

    def __init__(self, place: str, out: Path, options: CaptionOptions) -> None:
        self.folder, self.options = out, options
        self.shards = [shard for shard in shards_in(place) if shard.samples]
        require_images(self.shards)
        require_apart(self.shards, place, out)
        other = "this folder holds captions of other images, from another model, or made with other options"
        self._journal = Journal(out / JOURNAL, self._header(), other=other)
        found = ((str(row.pop("shard", "")), typed(Summary, row)) for row in self._journal.rows)
        self._done = {name: summary for name, summary in found if summary is not None}

    @property
    def samples(self) -> int:
        """Number of samples in the whole set."""
        return sum(shard.samples for shard in self.shards)

    @property
    def missing_bytes(self) -> int:
        """Bytes of the shards that are not written yet, without their new captions."""
        return sum(shard.record.bytes for shard in self.missing())

    def missing(self) -> list[PlannedShard]:
        """Return the shards that are not written yet."""
        done = self._done
        return [each for each in self.shards if not (each.record.name in done and self._file(each).is_file())]

    def make(self, progress: Progress = lambda done: None) -> tuple[Index, Summary]:
        """Describe what is missing and write the index; return it and the summary of the whole set.

        Args:
            progress: called with the number of samples done in the whole set.

        Raises:
            UserError: the disk is full, the model cannot be read or describes nothing, or a process died.
        """
        with alone_in(self.folder, "writing captions"):
            self._journal.begin()
            for folder in {self._file(shard).parent for shard in self.shards}:
                remove_leftovers(folder)
            self._describe(progress)
            names = [shard.record.name for shard in self.shards]
            return index_shards(self.folder, new_only=True, names=names, times=False), self._summary()

    def _describe(self, progress: Progress) -> None:
        missing = self.missing()
        done = self.samples - sum(shard.samples for shard in missing)

        def count(more: int) -> None:
            nonlocal done
            done += more
            progress(done)

        alone = len(self.options.devices[: max(1, len(missing))]) == 1  # then images are counted, else shards
        start = partial(_Captioner, self.folder, self.options, count if alone else None)
        for record, summary in worked_off(missing, self.options.devices, start, hint="lower --batch-size"):
            note_scanned(self.folder, record)
            self._journal.note(shard=record.name, **summary._asdict())
            self._done[record.name] = summary
            _journal_of(self.folder / record.name).unlink(missing_ok=True)
            if not alone:
                count(record.samples)

    def _summary(self) -> Summary:
        """Return the summary of all shards; write what could not be described to `rejected.tsv`."""
        parts = [(shard.record.name, self._done[shard.record.name]) for shard in self.shards]
        faults = [[f"{name}/{key}", reason] for name, each in parts for key, reason in each.faults]
        write_rejected(self.folder, faults)
        captions: Counter[str] = Counter()
        for _, each in parts:
            captions.update(each.captions)
        samples, cut = (sum(getattr(each, name) for _, each in parts) for name in ("samples", "cut"))
        return Summary(samples, dict(captions), cut, faults)

    def _file(self, shard: PlannedShard) -> Path:
        return self.folder / shard.record.name

    def _header(self) -> dict[str, Any]:
        options = self.options
        made_of = digest_of(self.shards, options.fingerprint, options.max_side_px)
        return {"model": options.model, "prompts": dict(options.prompts), "made_of": made_of}


def _journal_of(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.captions.jsonl")


class _Captioner:
    """Describes the images of whole shards on one device; one per process.

    `count` is called with the number of further images that are done.
    """

    def __init__(self, folder: Path, options: CaptionOptions, count: Progress | None, device: str) -> None:
        self.folder, self.options = folder, options
        self._count = count or (lambda more: None)
        self._describe = options.start(device)
        self._files = LocalFiles()
        self._asked = 0
        self._failed: Counter[str] = Counter()

    def __call__(self, shard: PlannedShard) -> tuple[ShardRecord, Summary]:
        """Describe the images of a shard and write it; return its index record and its summary."""
        jobs = jobs_of(shard)
        said = self._said(shard, jobs)
        faults: list[list[str]] = []
        path = self.folder / shard.record.name
        write_shard(path, self._samples(shard, jobs, said, faults), names_as_they_are=True)
        captions = Counter(kind for each in said for kind in each.said)
        cut = sum(len(each.cut) for each in said)
        return scan_shard(self.folder, shard.record.name), Summary(len(jobs), dict(captions), cut, faults)

    def _said(self, shard: PlannedShard, jobs: Sequence[Job]) -> list[_Said]:
        """Return the captions of each image; each batch is noted in the journal."""
        journal = _journal_of(self.folder / shard.record.name)
        said = _noted(journal, len(jobs))
        if any(each.said for each in said):  # from an earlier call: the model follows the prompt
            self._asked = FIRST
        self._count(len(said))
        size = self.options.batch_size
        batches = [jobs[first : first + size] for first in range(len(said), len(jobs), size)]
        with ThreadPoolExecutor(self.options.threads) as pool:
            loads = ([pool.submit(self._load, shard, job) for job in batch] for batch in batches)
            for coming in ahead(loads, BATCHES_AHEAD):
                new = self._of_batch([each.result() for each in coming])
                append_line(journal, {"first": len(said), "said": [each._asdict() for each in new]})
                said += new
                self._count(len(new))
        return said

    def _load(self, shard: PlannedShard, job: Job) -> Image.Image | str:
        """Return the image of a sample, or why there is none."""
        try:
            image = load_upright(read_sample(self._files, shard.url, job).image())
        except SampleFault as fault:
            return str(fault)
        long = max(image.size)
        most = self.options.max_side_px
        return image if long <= most else shrunk(image, max(1, round(min(image.size) * most / long)))

    def _of_batch(self, loaded: Sequence[Image.Image | str]) -> list[_Said]:
        said = [_Said({}, [], [["", each]] if isinstance(each, str) else []) for each in loaded]
        images = [each for each in loaded if not isinstance(each, str)]
        found = [one for one, each in zip(said, loaded, strict=True) if not isinstance(each, str)]
        for kind, prompt in self.options.prompts.items() if images else ():
            for each, answer in zip(found, self._answers(images, prompt), strict=True):
                _take(each, kind, answer)
        self._require_some(found)
        return said

    def _answers(self, images: Sequence[Image.Image], prompt: str) -> list[tuple[str, bool] | str]:
        """Return the caption of each image, or why there is none; a batch that fails is retried image by image."""
        try:
            return [*self._describe(images, prompt)]
        except torch.OutOfMemoryError as error:
            hint = "lower --batch-size; finished captions are kept"
            raise UserError("there is not enough memory on the device for a batch", hint=hint) from error
        except MODEL_FAULTS as error:
            if len(images) == 1:
                return [f"the model cannot handle it: {type(error).__name__}: {first_line(error)}"]
            return [answer for image in images for answer in self._answers([image], prompt)]

    def _require_some(self, found: Sequence[_Said]) -> None:
        """Raise UserError if none of the first images gets a caption."""
        if self._asked >= FIRST:
            return
        some = any(each.said for each in found)
        self._asked += FIRST if some else len(found)
        self._failed.update(reason for each in found for _, reason in each.faults)
        if self._asked >= FIRST and self._failed.total() and not some:
            ((reason, count),) = self._failed.most_common(1)
            what = f"{self.options.model} describes none of the first {self._asked} images: {reason} ({count} times)"
            raise UserError(what, where="--model", hint="try another prompt (--prompt KIND=TEXT) or another model")

    def _samples(
        self,
        shard: PlannedShard,
        jobs: Sequence[Job],
        said: Sequence[_Said],
        faults: list[list[str]],
    ) -> Iterator[tuple[str, dict[str, Field]]]:
        """Yield the samples with their new captions; add (key, reason) of those that lack some to `faults`."""
        prompts = self.options.prompts
        for job, each in zip(jobs, said, strict=True):
            try:
                raw = read_sample(self._files, shard.url, job)
            except SampleFault as fault:
                faults.append([f"#{job.ordinal}", f"left out: {fault}"])
                continue
            faults += [[raw.key, f"{kind}: {reason}" if kind else reason] for kind, reason in each.faults]
            new = [
                {"text": text, "kind": kind, "model": self.options.model, "prompt": prompts[kind]}
                for kind, text in each.said.items()
            ]
            yield raw.key, _with_captions(raw, new, faults)


def _noted(journal: Path, samples: int) -> list[_Said]:
    """Return what an interrupted call noted for a shard's images."""
    said: list[_Said] = []
    for row in read_lines(journal):
        new = typed(list[_Said], row.get("said"))
        if new is not None and row.get("first") == len(said) and len(said) + len(new) <= samples:
            said += new
    return said


def _take(found: _Said, kind: str, answer: tuple[str, bool] | str) -> None:
    """Note an answer: its cleaned text, or why there is none."""
    if isinstance(answer, str):
        found.faults.append([kind, answer])
        return
    text, cut = clean(answer[0]), answer[1]
    if is_blank(text):
        found.faults.append([kind, "the model returned no text"])
    elif len(text.encode()) > MAX_CAPTION_BYTES:
        found.faults.append([kind, "the model's caption is too long"])
    else:
        found.said[kind] = text
        if cut:
            found.cut.append(kind)


def _with_captions(raw: RawSample, new: Sequence[Mapping[str, object]], faults: list[list[str]]) -> dict[str, Field]:
    """Return the members of a sample with captions appended to the `captions` list of its record.

    A record that cannot be read is replaced by a new one, and noted in `faults`.
    """
    members: dict[str, Field] = dict(raw.members)
    if not new:
        return members
    try:
        record = parse_record(raw.members["json"]) if "json" in raw.members else {}
    except SampleFault as fault:
        record = {}
        faults.append([raw.key, f"record left out: {fault}"])
    record["captions"] = [*_taken_over(record, raw.key, faults), *new]
    content = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if len(content) > MAX_RECORD_BYTES:
        faults.append([raw.key, "the record would be too long with the new captions"])
        return members
    return {**members, "json": content}


def _taken_over(record: dict[str, Any], key: str, faults: list[list[str]]) -> list[object]:
    """Remove and return the captions of a record that training would read: they must be in one list with new ones.

    Values that cannot be read as captions would make the new ones unreadable; they are removed, and noted in `faults`.
    """
    there = [name for name in CaptionRules().fields if record.get(name) and _are_captions(record, name, key, faults)]
    if not there:
        return []
    present = record.pop(there[0])
    items = present if isinstance(present, list) else [present]
    if there[0] == "captions":
        return items
    return [{"kind": there[0], **(each if isinstance(each, dict) else {"text": each})} for each in items]


def _are_captions(record: dict[str, Any], name: str, key: str, faults: list[list[str]]) -> bool:
    try:
        captions_under(record[name], name)
    except SampleFault as fault:
        del record[name]
        faults.append([key, f"{name} of the record left out: {fault}"])
        return False
    return True
