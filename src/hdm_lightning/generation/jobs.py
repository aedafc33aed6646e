"""Many pictures in turn: what to draw, drawn in batches of equal settings, each kept as soon as it is there."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hdm_lightning.generation.pipeline import TextToImage
from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.generation.start_image import read_image


@dataclass(frozen=True)
class DrawJob:
    """One picture to draw."""

    prompt: str
    seed: int
    settings: SamplingSettings


def plan_jobs(
    prompts: Sequence[str], first_seed: int, count: int, settings: Iterable[SamplingSettings]
) -> list[DrawJob]:
    """`count` pictures of each prompt for each settings, with the seeds first_seed, first_seed + 1, …

    The same seeds serve all prompts and sizes, so that what differs between pictures is what was asked to differ.
    """
    seeds = range(first_seed, first_seed + count)
    return [DrawJob(prompt, seed, one) for one in settings for prompt in prompts for seed in seeds]


def draw_jobs(
    pipeline: TextToImage,
    jobs: Sequence[DrawJob],
    *,
    image: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[DrawJob, Tensor]]:
    """Draw jobs in batches of equal settings.

    Args:
        pipeline: draws, `pipeline.max_batch` pictures at once.
        jobs: those of equal settings side by side.
        image: picture to start all from, or None.
        progress: called with (solver steps done, solver steps in all).

    Yields:
        Each job with its picture, uint8 (3, H, W).
    """
    batches = list(_batches(jobs, pipeline.max_batch))
    total, before = sum(batch[0].settings.steps for batch in batches), 0
    for batch in batches:
        settings, start = batch[0].settings, before
        given = None if image is None else read_image(image, settings).expand(len(batch), -1, -1, -1)

        def tell(done: int, _steps: int, start: int = start) -> None:
            if progress is not None:
                progress(start + done, total)

        pictures = pipeline(
            [job.prompt for job in batch],
            [job.seed for job in batch],
            settings,
            images=given,
            progress=tell,
        )
        before += settings.steps
        yield from zip(batch, pictures, strict=True)


def _batches(jobs: Sequence[DrawJob], size: int) -> Iterator[list[DrawJob]]:
    for _, group in itertools.groupby(jobs, key=lambda job: job.settings):
        waiting = list(group)
        for start in range(0, len(waiting), size):
            yield waiting[start : start + size]
