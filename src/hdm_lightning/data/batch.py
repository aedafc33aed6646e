"""The shape in which samples reach a training loop, and the one in which they get there from the workers.

A worker sends a few samples at a time as one flat buffer, which costs one shared memory block instead of one a
sample. Shapes: n samples of a chunk, B samples of a batch, H×W pixels, L token places.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from hdm_lightning.data.samples import Sample


class Batch(TypedDict):
    """What every loader of this project yields.

    A masked sample (one that could not be read) keeps its row: a black image, a crop of the whole of it, one padding
    token, an empty caption and weight 0, so that shapes, order and the plan of every other sample stay as they were.
    """

    image: Tensor
    """uint8 (B,3,H,W), RGB."""
    crop: Tensor
    """float32 (B,4): top, left, full_height, full_width of the crop, in pixels of the resized full image."""
    tokens: Tensor
    """int64 (B,L): caption tokens, padded to the context length."""
    lengths: Tensor
    """int64 (B,): true token counts, at least 1."""
    index: Tensor
    """int64 (B,): position in the stage's global order."""
    weight: Tensor
    """float32 (B,): 1, or 0 for a masked sample."""
    keys: list[str]
    """`shard/key` of each sample."""
    captions: list[str]
    """The caption as chosen, before tokenization."""
    set_size: NotRequired[int]
    """Positions of the whole validation set; only in its batches."""


CHUNK_BYTES = 4 << 20
CHUNK_SAMPLES = 16


@dataclass
class Chunk:
    """Some samples of one worker; `turn` counts the chunks of that worker."""

    turn: int
    pixels: Tensor
    """uint8 (all pixels of all samples,), each sample as (3,H,W)."""
    shapes: list[tuple[int, int]]
    offsets: list[int]
    crop: Tensor
    tokens: Tensor
    lengths: list[int]
    index: list[int]
    weight: list[float]
    keys: list[str]
    captions: list[str]
    faults: list[str]


def chunk_samples(resolution: int) -> int:
    """How many samples of a resolution make a chunk."""
    return max(1, min(CHUNK_SAMPLES, CHUNK_BYTES // (3 * resolution * resolution)))


def pack_chunk(turn: int, samples: Sequence[Sample]) -> Chunk:
    """Samples as one chunk."""
    sizes = [sample.image.size for sample in samples]
    offsets = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    pixels = np.empty(offsets[-1], dtype=np.uint8)
    for sample, (start, end) in zip(samples, pairwise(offsets), strict=True):
        pixels[start:end].reshape(sample.image.shape)[...] = sample.image
    return Chunk(
        turn=turn,
        pixels=torch.from_numpy(pixels),
        shapes=[(sample.image.shape[1], sample.image.shape[2]) for sample in samples],
        offsets=offsets,
        crop=torch.tensor([sample.crop for sample in samples], dtype=torch.float32),
        tokens=torch.tensor([sample.tokens for sample in samples], dtype=torch.int64),
        lengths=[sample.length for sample in samples],
        index=[sample.index for sample in samples],
        weight=[sample.weight for sample in samples],
        keys=[sample.key for sample in samples],
        captions=[sample.caption for sample in samples],
        faults=[sample.fault for sample in samples],
    )


def in_order(chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, int]]:
    """The samples of chunks that came from workers in turn, in the order of the stream."""
    together: list[Chunk] = []
    for chunk in chunks:
        if together and chunk.turn != together[0].turn:
            yield from _interleaved(together)
            together = []
        together.append(chunk)
    yield from _interleaved(together)


def _interleaved(chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, int]]:
    for row in range(max((len(chunk.index) for chunk in chunks), default=0)):
        for chunk in chunks:
            if row < len(chunk.index):
                yield chunk, row


def collate(rows: Sequence[tuple[Chunk, int]], *, pin_memory: bool = False) -> Batch:
    """Samples as a batch.

    Raises:
        ValueError: their crops differ in shape.
    """
    height, width = rows[0][0].shapes[rows[0][1]]
    image = torch.empty(len(rows), 3, height, width, dtype=torch.uint8, pin_memory=pin_memory)
    for target, (chunk, row) in zip(image, rows, strict=True):
        if chunk.shapes[row] != (height, width):
            raise ValueError(f"crops of a batch must share a shape, got {(height, width)} and {chunk.shapes[row]}")
        target.copy_(chunk.pixels[chunk.offsets[row] : chunk.offsets[row + 1]].view(3, height, width))
    return Batch(
        image=image,
        crop=torch.stack([chunk.crop[row] for chunk, row in rows]),
        tokens=torch.stack([chunk.tokens[row] for chunk, row in rows]),
        lengths=torch.tensor([chunk.lengths[row] for chunk, row in rows], dtype=torch.int64),
        index=torch.tensor([chunk.index[row] for chunk, row in rows], dtype=torch.int64),
        weight=torch.tensor([chunk.weight[row] for chunk, row in rows], dtype=torch.float32),
        keys=[chunk.keys[row] for chunk, row in rows],
        captions=[chunk.captions[row] for chunk, row in rows],
    )
