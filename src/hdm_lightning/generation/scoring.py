"""Prompt-following on scenes with known answers: draw the prompts, read the images, score them."""

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
    """Images, uint8 (B,3,H,W), and how each of them was graded."""

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
    """Draw one image a caption, image number i with the seed `seed + i`, and grade it against what was asked for.

    `specs` say what each prompt asks for, as in the shapes set's records; `unit` tells combinations apart;
    `progress` is called with (solver steps done, in all).
    """
    seeds = [seed + number for number in range(len(captions))]
    images = pipeline.draw(captions, seeds, settings, progress=progress)
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    return ScoredImages(images, grade_images(specs, arrays, unit=unit))


def score_decoded(
    pipeline: HDMPipeline, images: Sequence[NDArray[np.uint8]], specs: Sequence[Mapping[str, Any]], **options: Any
) -> Graded:
    """Grade right answers, uint8 (H,W,3) of one size, as the pipeline's autoencoder leaves them: the most to reach."""
    decoded = []
    with torch.no_grad():
        for start in range(0, len(images), _DECODE_BATCH):
            part = torch.from_numpy(np.stack(images[start : start + _DECODE_BATCH])).permute(0, 3, 1, 2)
            given = part.to(pipeline.device).float() / 127.5 - 1.0
            decoded += list(to_uint8(pipeline.autoencoder.decode(pipeline.autoencoder.encode(given))).cpu())
    return grade_images(specs, [image.permute(1, 2, 0).numpy() for image in decoded], **options)
