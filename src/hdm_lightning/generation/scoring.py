"""Prompt-following on scenes with known answers: draw the prompts, read the images, score them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.metrics.bootstrap import Bootstrap
from hdm_lightning.metrics.prompt_following import RESAMPLES, Score, score_images

_USUAL = Bootstrap(RESAMPLES)


@dataclass(frozen=True)
class ScoredImages:
    """Images, uint8 (B,3,H,W), and their scores by criterion."""

    images: Tensor
    scores: dict[str, Score]


def draw_and_score(
    pipeline: HDMPipeline,
    captions: Sequence[str],
    specs: Sequence[Mapping[str, Any]],
    settings: SamplingSettings,
    *,
    seed: int = 0,
    intervals: Bootstrap = _USUAL,
    progress: Callable[[int, int], None] | None = None,
) -> ScoredImages:
    """Draw one image a caption, image number i with the seed `seed + i`, and score it against what was asked for.

    `specs` say what each prompt asks for, as in the shapes set's records; `intervals` resamples the images;
    `progress` is called with (solver steps done, in all).
    """
    seeds = [seed + number for number in range(len(captions))]
    images = pipeline.draw(captions, seeds, settings, progress=progress)
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    scores = score_images(
        specs, arrays, seed=intervals.seed, resamples=intervals.resamples, confidence=intervals.confidence
    )
    return ScoredImages(images, scores)
