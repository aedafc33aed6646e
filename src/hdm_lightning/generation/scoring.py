"""Prompt following on scenes with known answers: generate the images, read them, score them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdm_lightning.generation.image_files import to_uint8
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.metrics.prompt_following import UNIT, Graded, grade_images

_DECODE_BATCH = 32


@dataclass(frozen=True)
class ScoredImages:
    """Images, uint8 (B,3,H,W), and their grades."""

    images: Tensor
    graded: Graded


def draw_and_score(
    pipeline: HDMPipeline,
    captions: Sequence[str],
    specs: Sequence[Mapping[str, Any]],
    settings: SamplingSettings,
    *,
    seed: int = 0,
    unit: Sequence[str] = UNIT,
    progress: Callable[[int, int], None] | None = None,
) -> ScoredImages:
    """Generate one image per caption, image i with the seed `seed + i`, and grade it against its specification.

    `specs` state what each prompt asks for, as in the records of the shapes set; `unit` names the fields that
    distinguish combinations; `progress` is called with (solver steps done, total steps).
    """
    seeds = [seed + number for number in range(len(captions))]
    images = pipeline.draw(captions, seeds, settings, progress=progress)
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    return ScoredImages(images, grade_images(specs, arrays, unit=unit))


def score_decoded(
    pipeline: HDMPipeline, images: Sequence[NDArray[np.uint8]], specs: Sequence[Mapping[str, Any]], **options: Any
) -> Graded:
    """Grade correct images, uint8 (H,W,3) of one size, after a round trip through the autoencoder: the upper bound."""
    decoded = []
    with torch.no_grad():
        for start in range(0, len(images), _DECODE_BATCH):
            part = torch.from_numpy(np.stack(images[start : start + _DECODE_BATCH])).permute(0, 3, 1, 2)
            given = part.to(pipeline.device).float() / 127.5 - 1.0
            decoded += list(to_uint8(pipeline.autoencoder.decode(pipeline.autoencoder.encode(given))).cpu())
    return grade_images(specs, [image.permute(1, 2, 0).numpy() for image in decoded], **options)
