"""Real and generated images of an evaluation: read or generated batch by batch, kept as features and thumbnails.

Shapes: B images of a batch, N in all, images (B,3,H,W), uint8.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hdm_lightning.data.rules import StreamConfig
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import Sample, stream
from hdm_lightning.data.shard_bytes import is_local
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.findings import Pixels
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.metrics.features import FeatureNetwork, thumbnails

THUMBNAIL_PX = 96
KEPT_WHOLE = 24
READ_BATCH = 32

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how many are done, out of how many)."""


class Captioned(NamedTuple):
    """A batch of images with their captions and names."""

    images: Tensor
    captions: list[str]
    keys: list[str]


@dataclass(frozen=True)
class ImageSet:
    """What is kept of N images: features (N,D) by network, thumbnails of center squares, the first few images whole."""

    captions: list[str]
    keys: list[str]
    features: dict[str, Tensor]
    thumbnails: Tensor
    whole: list[Tensor]

    def __len__(self) -> int:
        return len(self.captions)


def collect(batches: Iterable[Captioned], networks: Sequence[FeatureNetwork]) -> ImageSet:
    """Run the networks over batches and keep what later parts need. Raises UserError: there is no image at all."""
    captions: list[str] = []
    keys: list[str] = []
    small: list[Tensor] = []
    whole: list[Tensor] = []
    features: dict[str, list[Tensor]] = {network.name: [] for network in networks}
    for batch in batches:
        captions += batch.captions
        keys += batch.keys
        small.append(thumbnails(batch.images, THUMBNAIL_PX))
        whole += [image.clone() for image in batch.images[: max(0, KEPT_WHOLE - len(whole))]]
        for network in networks:
            features[network.name].append(network(batch.images).cpu())
    if not captions:
        hint = "run `hdm-shards verify FOLDER` to see what is wrong with them"
        raise UserError("none of the images looked at can be read", hint=hint)
    joined = {name: torch.cat(parts) for name, parts in features.items()}
    return ImageSet(captions, keys, joined, torch.cat(small), whole)


def middle_crops(config: StreamConfig) -> StreamConfig:
    """Return the stream as evaluation reads it: center squares, no flips, whole captions, no list of bad samples."""
    crop = replace(config.crop, centre=True, flip=False, buckets=None)
    captions = replace(config.captions, drop=0.0)
    return replace(config, crop=crop, captions=captions, quarantine=None, workers=0, memory_cache_gb=0.0)


def real_images(config: StreamConfig, plan: Plan, count: int) -> Iterator[Captioned]:
    """Yield the first `count` images of a stream of center crops, at most one pass; unreadable ones are left out."""
    samples = stream(config, lambda _: ([0], 1), stop=min(count, plan.samples), training=False, plan=plan)
    good = (sample for sample in samples if sample.weight > 0)
    while batch := [sample for _, sample in zip(range(READ_BATCH), good, strict=False)]:
        images = torch.from_numpy(np.stack([sample.image for sample in batch]))
        yield Captioned(images, [sample.caption for sample in batch], [_address(plan, sample) for sample in batch])


def _address(plan: Plan, sample: Sample) -> str:
    """Return a name that is unique among the samples of all folders: its shard's path, and its key."""
    place = plan.locate(sample.index)
    url = plan.parts[place.part].shards[place.shard].url
    folder = os.path.realpath(url) if is_local(url) else url
    return f"{folder}/{sample.key.rpartition('/')[2]}"


def drawn_images(
    pipeline: HDMPipeline, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
) -> Iterator[Captioned]:
    """Generate an image for each prompt and seed, in order, in batches as large as the pipeline takes."""
    for start in range(0, len(prompts), pipeline.max_batch):
        part = slice(start, start + pipeline.max_batch)
        images = pipeline.draw(prompts[part], seeds[part], settings)
        yield Captioned(images, list(prompts[part]), list(map(str, seeds[part])))


def reported(batches: Iterable[Captioned], progress: Progress, what: str, count: int) -> Iterator[Captioned]:
    """Yield the batches, and report progress after each."""
    done = 0
    progress(what, 0, count)
    for batch in batches:
        yield batch
        done += len(batch.captions)
        progress(what, done, count)


def pixels(image: Tensor) -> Pixels:
    """Convert a uint8 tensor (3,H,W) to an array (H,W,3)."""
    return image.permute(1, 2, 0).cpu().numpy()
