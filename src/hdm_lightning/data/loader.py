"""Batches of one rank: worker processes prepare samples, which are put back in order.

Shapes: B samples per batch, H×W pixels, L tokens.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby, zip_longest
from math import ceil, prod
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hdm_lightning.data import worker_processes
from hdm_lightning.data.faults import FaultMeter
from hdm_lightning.data.order import first_position, readers_per_rank
from hdm_lightning.data.rules import StreamConfig
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import Preparation, Sample, Tokenize
from hdm_lightning.data.text_states import TextStates

CHUNK_BYTES = 4 << 20
CHUNK_SAMPLES = 16


class Batch(TypedDict):
    """A batch, as every loader of this project yields it.

    A masked sample (one that could not be read) keeps its row, with a black image, a crop of all of it, one padding
    token, an empty caption and weight 0, so that shapes, order and the plan of all other samples stay the same.
    """

    image: NotRequired[Tensor]
    """uint8 (B,3,H,W), RGB; or (B,4,H,W), where the fourth channel is each pixel's weight in the loss."""
    latent: NotRequired[Tensor]
    """float16 (B,M,C,H/f,W/f), instead of `image`: mean and, if M is 2, standard deviation of the crop's latent."""
    autoencoder: NotRequired[str]
    """Fingerprint of the autoencoder that encoded `latent`."""
    crop: Tensor
    """float32 (B,4): top, left, full_height, full_width of the crop, in pixels of the resized full image."""
    context: NotRequired[Tensor]
    """(B,L,W): text-encoder states of the captions from disk, zero-padded, in the dtype in which they are stored."""
    text_encoder: NotRequired[str]
    """Fingerprint of the text encoder that computed `context`."""
    tokens: Tensor
    """int64 (B,L): caption tokens, padded to the context length, or to the shortest sufficient one of the lengths."""
    lengths: Tensor
    """int64 (B,): token counts without padding, at least 1."""
    index: Tensor
    """int64 (B,): position in the stage's global order."""
    weight: Tensor
    """float32 (B,): 1, or 0 for a masked sample."""
    keys: list[str]
    """`shard/key` of each sample."""
    captions: list[str]
    """The caption as chosen, before tokenization."""
    text_is_full: NotRequired[bool]
    """Whether the batch has the greatest length and no caption is padded; only if the loader has lengths."""
    set_size: NotRequired[int]
    """Number of positions in the validation set; only in its batches."""


_TENSORS = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float16): torch.float16}


def collate(samples: Sequence[Sample], *, pin_memory: bool = False, lengths: Sequence[int] = ()) -> Batch:
    """Collate samples into a batch, with captions padded to the shortest of the ascending `lengths` that fits all.

    Raises:
        ValueError: the crops differ in shape.
    """
    shapes = {sample.image.shape for sample in samples}
    if len(shapes) > 1:
        raise ValueError(f"crops of a batch must share a shape, got {sorted(shapes)}")
    kind = samples[0].image.dtype
    image = torch.empty(len(samples), *shapes.pop(), dtype=_TENSORS[kind], pin_memory=pin_memory)
    np.stack([sample.image for sample in samples], out=image.numpy())
    seen: Any = {"image" if image.dtype == torch.uint8 else "latent": image}
    text = places(samples, lengths)
    batch = Batch(
        **seen,
        crop=torch.tensor([sample.crop for sample in samples], dtype=torch.float32),
        tokens=torch.tensor([sample.tokens[:text] for sample in samples], dtype=torch.int64),
        lengths=torch.tensor([sample.length for sample in samples], dtype=torch.int64),
        index=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        weight=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
        keys=[sample.key for sample in samples],
        captions=[sample.caption for sample in samples],
    )
    if text is not None:
        # A shorter length that happens to be full is not worth a compiled graph of its own without a mask.
        batch["text_is_full"] = text == lengths[-1] == min(sample.length for sample in samples)
    return batch


class StreamLoader:
    """An endless loader: batch m of a rank has the rank's positions m·B … (m+1)·B − 1 after the start.

    With `together` = k, the samples of k batches are sorted by caption length before they are split into the k batches.

    Args:
        config, plan: the stream and its order.
        tokenize: maps a caption to (token ids, count without padding); must be picklable if workers are spawned.
        batch_size: B, samples per batch on this rank.
        rank, world: this rank has the positions g = rank (mod world).
        start: first global position, or a function that returns it at the start of each iteration.
        pin_memory: put batches in page-locked memory.
        lengths: lengths that captions are padded to, ascending to the context length; empty for that alone.
        together: number of batches that are made from one group of samples sorted by length.
        text_states: source of the captions' states; None for batches without them.
        validated: whether a validation loader will run at the same time.
    """

    def __init__(
        self,
        config: StreamConfig,
        plan: Plan,
        tokenize: Tokenize,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        start: int | Callable[[], int] = 0,
        pin_memory: bool = False,
        lengths: Sequence[int] = (),
        together: int = 1,
        text_states: TextStates | None = None,
        validated: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        plan.require_batches(batch_size * world, start if isinstance(start, int) else 0)
        self.config, self.plan, self.tokenize = config, plan, tokenize
        self.batch_size, self.rank, self.world, self.start = batch_size, rank, world, start
        self.pin_memory, self.lengths, self.together = pin_memory, lengths, together
        self.text_states = text_states
        self.validated = validated
        self.workers = readers_per_rank(config.workers, lanes=config.lanes, world=world)

    def __iter__(self) -> Iterator[Batch]:
        return self._batches(self._chunks())

    def _chunks(self) -> "_Chunks":
        start = self.start if isinstance(self.start, int) else self.start()
        self.plan.require_batches(self.batch_size * self.world, start)
        first = first_position(start, self.rank, self.world)
        return _Chunks(self.config, self.plan, self.tokenize, first, self.world)

    def _batches(self, chunks: "_Chunks") -> Iterator[Batch]:
        for samples in by_length(self._samples(chunks), self.batch_size, self.together):
            yield self._batch(samples)

    def _samples(self, chunks: "_Chunks") -> Iterator[Sample]:
        meter = FaultMeter(self.config.max_bad_share, self.config.bad_patience, self.config.quarantine)
        for sample in in_order(self._source(chunks)):
            meter.count(sample.fault or None)
            yield sample

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        batch = collate(samples, pin_memory=self.pin_memory, lengths=self.lengths)
        if self.plan.latents is not None:
            batch["autoencoder"] = self.plan.latents.autoencoder
        if self.text_states is not None:
            given = (batch["tokens"], batch["lengths"], batch["weight"], batch["captions"])
            batch["context"] = self.text_states.context(*given)
            batch["text_encoder"] = self.text_states.format.text_encoder
        return batch

    def _source(self, chunks: "_Chunks") -> Iterator["Chunk"]:
        if self.workers == 0:
            return iter(chunks)
        worker_processes.require_room_for_sockets(tempfile.gettempdir())
        largest = largest_sample_bytes(self.config, self.plan)
        loaders = worker_processes.ranks_here(self.world) * (2 if self.validated else 1)
        free, chunk = worker_processes.free_shared_memory(), chunk_samples(largest) * largest
        worker_processes.require_shared_memory(self.workers, chunk, free, loaders)
        loader = DataLoader(
            chunks,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=worker_processes.PREFETCHED,
            timeout=worker_processes.POLL_S,
            worker_init_fn=worker_processes.ignore_stop_signals,
            multiprocessing_context=worker_processes.FORK,
        )
        return worker_processes.naming_dead_workers(loader)


class ValidationLoader(StreamLoader):
    """A finite loader over the first positions of a fixed order, with the same number of batches on every rank.

    Each position belongs to one rank; the last batches are filled up with masked samples, so that no rank waits for
    another. Each sample has its first caption, never dropped.

    Args:
        samples: total number of positions, capped at the number of planned samples.
        options: `rank`, `world`, `pin_memory` and `text_states`, as for `StreamLoader`.
    """

    def __init__(
        self, config: StreamConfig, plan: Plan, tokenize: Tokenize, *, samples: int, batch_size: int, **options: Any
    ) -> None:
        super().__init__(config, plan, tokenize, batch_size=batch_size, **options)
        self.samples = min(samples, plan.samples)

    def __len__(self) -> int:
        return ceil(ceil(self.samples / self.world) / self.batch_size)

    def _chunks(self) -> "_Chunks":
        end = {"rows": len(self) * self.batch_size, "stop": self.samples}
        return _Chunks(self.config, self.plan, self.tokenize, self.rank, self.world, **end, training=False)

    def _batches(self, chunks: "_Chunks") -> Iterator[Batch]:
        for batch in super()._batches(chunks):
            yield {**batch, "set_size": self.samples}


@dataclass
class Chunk:
    """Samples in transit from one worker, their pixels end to end in a single block of shared memory."""

    turn: int
    """Number of chunks that the worker sent before."""
    pixels: Tensor
    """uint8 (all pixels of all samples,), or float16 for moments."""
    shapes: list[tuple[int, ...]]
    samples: list[Sample]
    """The samples without pixels."""

    @classmethod
    def of(cls, turn: int, samples: Sequence[Sample]) -> "Chunk":
        """Pack samples into one chunk."""
        shapes, nothing = [sample.image.shape for sample in samples], np.empty(0, dtype=np.uint8)
        pixels = np.empty(sum(sample.image.size for sample in samples), dtype=samples[0].image.dtype)
        for sample, image in zip(samples, _images(pixels, shapes), strict=True):
            image[...] = sample.image
        return cls(turn, torch.from_numpy(pixels), shapes, [replace(sample, image=nothing) for sample in samples])

    def unpacked(self) -> list[Sample]:
        """Return the samples, with their images as views."""
        images = _images(self.pixels.numpy(), self.shapes)
        return [replace(sample, image=image) for sample, image in zip(self.samples, images, strict=True)]


def _images(pixels: NDArray[Any], shapes: Sequence[tuple[int, ...]]) -> list[NDArray[Any]]:
    """Return images that are stored end to end, as views."""
    ends = np.cumsum([prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(pixels, ends[:-1]), shapes, strict=True)]


@dataclass(eq=False)
class _Chunks(IterableDataset[Chunk]):
    """The chunks of one worker: every n-th sample of its rank, starting at the worker's number."""

    config: StreamConfig
    plan: Plan
    tokenize: Tokenize
    first: int
    world: int
    rows: int | None = None
    stop: int | None = None
    training: bool = True

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        preparation = Preparation(self.config, self.plan, self.tokenize, training=self.training, stop=self.stop)
        size = chunk_samples(preparation.masked(0).image.nbytes)
        for turn in count():
            rows = [worker + workers * (turn * size + place) for place in range(size)]
            samples = [self._sample(preparation, row) for row in rows if self.rows is None or row < self.rows]
            if not samples:
                return
            yield Chunk.of(turn, samples)

    def _sample(self, preparation: Preparation, row: int) -> Sample:
        position = self.first + row * self.world
        if self.stop is not None and position >= self.stop:
            return preparation.masked(position)
        return preparation.sample(position)


def in_order(chunks: Iterable[Chunk]) -> Iterator[Sample]:
    """Yield the samples in the order of the stream, from chunks that come from the workers in turn."""
    for _, together in groupby(chunks, key=lambda chunk: chunk.turn):
        for row in zip_longest(*(chunk.unpacked() for chunk in together)):
            yield from (sample for sample in row if sample is not None)


def largest_sample_bytes(config: StreamConfig, plan: Plan) -> int:
    """Return the size in bytes of the plan's largest sample, without its text."""
    if plan.latents is not None:
        return max(plan.latents.masked(shape).nbytes for shape in plan.shapes)
    return (4 if config.alpha == "mask" else 3) * max(height * width for height, width in plan.shapes)


def chunk_samples(sample_bytes: int) -> int:
    """Return how many samples of this size a worker sends at a time."""
    return max(1, min(CHUNK_SAMPLES, CHUNK_BYTES // max(1, sample_bytes)))


def by_length(samples: Iterable[Sample], size: int, together: int) -> Iterator[list[Sample]]:
    """Yield batches of `size` from groups of `together` · `size` consecutive samples, the longest captions first.

    The next group is read while the current one is yielded, so only the start has to wait for a whole group.
    """
    ready: deque[list[Sample]] = deque()
    coming: list[Sample] = []
    for sample in samples:
        # A view would hold on to the worker's shared memory, which may be scarce.
        coming.append(sample if together == 1 else replace(sample, image=sample.image.copy()))
        if len(coming) == size * together:
            group = sorted(coming, key=lambda each: -each.length) if together > 1 else coming
            ready.extend(group[first : first + size] for first in range(0, len(group), size))
            coming = []
        if ready and len(coming) % size == 0:
            yield ready.popleft()


def places(samples: Sequence[Sample], lengths: Sequence[int]) -> int | None:
    """Return the shortest of the ascending `lengths` that fits the captions of all samples; None without lengths."""
    longest = max(sample.length for sample in samples)
    return next((each for each in lengths if each >= longest), None)
