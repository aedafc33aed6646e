"""Encode shards of images to shards of latents with the same keys in the same order, each image once and whole.

A set is made shard by shard, each written whole or not at all, so an interrupted call resumes where it stopped.

Shapes: H×W pixels of the resized image, C latent channels, h×w cells.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.decode import decode, upright_size
from hdm_lightning.data.faults import Quarantine, SampleFault
from hdm_lightning.data.index import INDEX_NAME, LATENTS_NAME, Index, set_folder, write_index
from hdm_lightning.data.latent_sets import LatentFormat, pack_latent
from hdm_lightning.data.reader import LocalFiles
from hdm_lightning.data.sample_plan import PlannedShard
from hdm_lightning.data.sample_table import IMAGE_EXTENSIONS, LATENT, RawSample
from hdm_lightning.data.scanning import index_shards, note_scanned, scan_shard
from hdm_lightning.data.shard_record import ShardRecord
from hdm_lightning.data.tar import BLOCK
from hdm_lightning.datasets.shard_work import (
    Job,
    ahead,
    alone_in,
    digest_of,
    is_begun,
    jobs_of,
    read_sample,
    require_apart,
    require_images,
    shards_in,
    worked_off,
)
from hdm_lightning.datasets.writer import Field, require_no_shards, write_shard
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import remove_leftovers, write_json

FAULTS_NAME = "faults.jsonl"
BATCHES_AHEAD = 2
MEMBER_HEAD = 256
"""Approximate bytes of a latent's member besides its numbers."""

Progress = Callable[[int], None]
Encode = Callable[[torch.Tensor], torch.Tensor]
"""uint8 images (B,3,H,W) on the CPU to the moments of their posteriors (B,2,C,h,w), on any device."""


@dataclass(frozen=True)
class EncodeOptions:
    """How a set of latents is made.

    Attributes:
        start: makes the encoder for a device, given by name; must be picklable if there are several devices.
        max_pixels: most pixels encoded at once, over all images; a single larger image is encoded alone.
        dtype: the type that `start` computes in, such as `bfloat16`; a set made in another type is a different set.
        max_aspect: largest ratio of the long to the short side; longer images are left out.
        devices: `cuda:0`, `cpu`, …: one process each; a device may be listed more than once.
        threads: threads that decode images, per process.
    """

    start: Callable[[str], Encode]
    max_pixels: int
    dtype: str = "float32"
    max_aspect: float = CropRules.max_aspect
    devices: tuple[str, ...] = ("cpu",)
    threads: int = 1


class Forecast(NamedTuple):
    """The size of a set: samples and bytes in total, and bytes still to be written."""

    samples: int
    bytes: int
    missing: int


class EncodedSet:
    """The set of latents at one resolution that is made from a source's shards.

    Args:
        place: folder, shard or pattern of indexed shards of images.
        out: folder of the sets of all resolutions.
        form: format of the latents.
        options: how it is made.

    Raises:
        UserError: the shards cannot be used, or the folder holds something else.
    """

    def __init__(self, place: str, out: Path, form: LatentFormat, options: EncodeOptions) -> None:
        self.out, self.format, self.options, self.folder = out, form, options, out / set_folder(form.resolution)
        found = shards_in(place)
        require_images(found)
        limits = CropRules(max_aspect=options.max_aspect)
        self.shards = [shard.only(limits.accepts(*shard.shapes(), form.resolution)) for shard in found]
        require_apart(self.shards, place, out)
        require_no_shards(out, but=[each.name for each in out.glob("*px") if _is_set(each)])
        self._require_no_others()

    def missing(self) -> list[PlannedShard]:
        """Return the shards that are not encoded yet."""
        return [shard for shard in self.shards if not (self.folder / shard.record.name).is_file()]

    def forecast(self) -> Forecast:
        """Return how much there is to encode."""
        sizes = {shard.record.name: encoded_bytes(shard, self.format) for shard in self.shards}
        missing = sum(sizes[shard.record.name] for shard in self.missing())
        return Forecast(self.samples, sum(sizes.values()), missing)

    def make(self, progress: Progress = lambda done: None) -> Index:
        """Encode what is missing and write the index.

        Args:
            progress: called with the number of samples done in the whole set.

        Raises:
            UserError: the disk is full, the autoencoder returns non-finite numbers, a process died, or another call
                has started another set here.
        """
        with alone_in(self.folder, "encoding"):
            self._require_no_others()  # another call may have started one meanwhile
            write_json(self.folder / LATENTS_NAME, {**self.format.to_json(), **self._made_of()})
            for folder in {(self.folder / shard.record.name).parent for shard in self.shards}:
                remove_leftovers(folder)
            missing = self.missing()
            done = self.samples - sum(shard.samples for shard in missing)
            start = partial(_Encoder, self.folder, self.format, self.options)
            for record in worked_off(missing, self.options.devices, start, hint="lower --max-pixels"):
                note_scanned(self.folder, record)
                done += record.samples
                progress(done)
            return self._index()

    @property
    def samples(self) -> int:
        """Number of samples in the whole set."""
        return sum(shard.samples for shard in self.shards)

    def _index(self) -> Index:
        """Write the index of the set, in the source's order, and the one of all sets; return the first."""
        order = [shard.record.name for shard in self.shards]
        index = index_shards(self.folder, new_only=True, names=order, times=False)
        there = (int(path.parent.name[:-2]) for path in self.out.glob(f"*px/{INDEX_NAME}") if _is_set(path.parent))
        write_index(Index(str(self.out), (), None, tuple(sorted(there))), self.out / INDEX_NAME)
        return index

    def _require_no_others(self) -> None:
        """Raise UserError if the folder holds a set other than this one."""
        holds = "latents of other images, from another autoencoder, or made with other options"
        if not is_begun(self.folder / LATENTS_NAME, self._is_described_by, holds):
            require_no_shards(self.folder)

    def _is_described_by(self, written: dict[str, Any]) -> bool:
        return LatentFormat.from_json(written) == self.format and self._made_of().items() <= written.items()

    def _made_of(self) -> dict[str, Any]:
        """Return what else is recorded: the number of shards, and a hash of them and of the options that matter."""
        made_of = digest_of(self.shards, self.options.dtype, self.options.max_aspect)
        return {"shards": len(self.shards), "made_of": made_of}


def _is_set(folder: Path) -> bool:
    return folder.name[:-2].isdigit() and (folder / LATENTS_NAME).is_file()


def encoded_bytes(shard: PlannedShard, form: LatentFormat) -> int:
    """Return the approximate bytes of a shard once it is encoded; images of unknown size count as squares."""
    table, (height, width) = shard.table(), shard.shapes()
    short, long = np.maximum(1, np.minimum(height, width)), np.maximum(1, np.maximum(height, width))
    cells = (form.resolution * long / short // form.factor) * (form.resolution // form.factor)
    moments = 2 * form.moments * form.channels * cells + MEMBER_HEAD
    kept = np.zeros((len(table.layouts), table.sizes.shape[1]), dtype=bool)
    for number, layout in enumerate(table.layouts):
        for place, (extension, _) in enumerate(layout.members):
            kept[number, place] = extension not in IMAGE_EXTENSIONS
    others = np.where(kept[table.layout], table.sizes, 0)
    padded = (-(-others // BLOCK) * BLOCK).sum() + BLOCK * kept[table.layout].sum()
    return int((-(-moments // BLOCK) * BLOCK + BLOCK).sum() + padded) + 20 * BLOCK


class _Loaded(NamedTuple):
    """A sample that was read: its members, its original size, and its pixels or why there are none."""

    raw: RawSample
    height: int
    width: int
    pixels: NDArray[np.uint8] | None
    fault: str = ""


class _Encoder:
    """Encodes whole shards on one device; one per process."""

    def __init__(self, folder: Path, form: LatentFormat, options: EncodeOptions, device: str) -> None:
        self.folder, self.format, self.options = folder, form, options
        self._moments = options.start(device)
        self._files = LocalFiles()
        self._faults = Quarantine(str(folder / FAULTS_NAME))

    def __call__(self, shard: PlannedShard) -> ShardRecord:
        """Encode a shard and write it; return its index record."""
        jobs, samples = jobs_of(shard), {}
        # Images of one shape are batched; batches depend on the shard alone, so that encoding it is reproducible.
        in_turn = sorted(range(len(jobs)), key=lambda number: (*self._shape(jobs[number]), number))
        batches = _batches(in_turn, lambda number: self._shape(jobs[number]), self.options.max_pixels)
        with ThreadPoolExecutor(self.options.threads) as pool:
            loads = ((numbers, [pool.submit(self._load, shard, jobs[each]) for each in numbers]) for numbers in batches)
            for numbers, coming in ahead(loads, BATCHES_AHEAD):
                loaded = [each.result() for each in coming]
                for number, latent, one in zip(numbers, self._latents(loaded), loaded, strict=True):
                    samples[number] = one.raw.key, _fields(one.raw, latent)
                    if one.fault:
                        at = jobs[number].ordinal
                        self._faults.add(shard=shard.url, key=one.raw.key, ordinal=at, reason=one.fault, index=at)
        name = shard.record.name
        ordered = [samples[number] for number in range(len(jobs))]
        write_shard(self.folder / name, dict(ordered), names_as_they_are=True)
        return scan_shard(self.folder, name)

    def _shape(self, job: Job) -> tuple[int, int]:
        if not job.height:
            return 0, 0
        whole = self.format.whole(job.height, job.width)
        return whole.height, whole.width

    def _load(self, shard: PlannedShard, job: Job) -> _Loaded:
        raw, height, width = RawSample(f"#{job.ordinal}", {}), job.height, job.width
        try:
            raw = read_sample(self._files, shard.url, job)
            height, width = upright_size(raw.image())
            pixels, _ = decode(raw.image(), self.format.whole)
        except SampleFault as fault:
            return _Loaded(raw, height, width, None, str(fault))
        return _Loaded(raw, height, width, np.ascontiguousarray(pixels))

    def _latents(self, loaded: Sequence[_Loaded]) -> list[bytes]:
        """Return the latent members of samples; their images have one shape unless sizes were unknown."""
        found = [pack_latent(each.height, each.width, None) for each in loaded]
        seen = [(number, each.pixels) for number, each in enumerate(loaded) if each.pixels is not None]
        for _, group in groupby(seen, key=lambda each: each[1].shape):
            numbers, pixels = zip(*group, strict=True)
            moments = self._moments(torch.from_numpy(np.stack(pixels)))[:, : self.format.moments].half().cpu()
            if not torch.isfinite(moments).all():
                what = "the autoencoder returns numbers that are not finite or too large for half precision"
                raise UserError(what, where="--dtype", hint="use bfloat16 or float32")
            for number, one in zip(numbers, moments.numpy(), strict=True):
                found[number] = pack_latent(loaded[number].height, loaded[number].width, one)
        return found


def _batches(numbers: Sequence[int], shape: Callable[[int], tuple[int, int]], max_pixels: int) -> Iterator[list[int]]:
    """Yield batches of samples of one shape, as large as `max_pixels` allows; those of unknown shape one by one."""
    for (height, width), group in groupby(numbers, key=shape):
        same, count = list(group), max(1, max_pixels // (height * width)) if height else 1
        yield from (same[first : first + count] for first in range(0, len(same), count))


def _fields(raw: RawSample, latent: bytes) -> dict[str, Field]:
    others: dict[str, Field] = {name: data for name, data in raw.members.items() if name not in IMAGE_EXTENSIONS}
    return {LATENT: latent, **others}
