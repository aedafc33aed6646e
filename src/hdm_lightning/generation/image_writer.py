"""Many images in turn: what to draw, drawn in batches of equal settings, each written as soon as it is there."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hdm_lightning.generation.contact_sheet import contact_sheet
from hdm_lightning.generation.image_files import ImageRecord, read_image, sha256_of, to_pil, write_png
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.whole_files import write_atomically

SLUG_LENGTH, SLUG_BYTES = 48, 120
"""Letters, and bytes in UTF-8, of which file systems allow a name 143 to 255."""


@dataclass(frozen=True)
class DrawJob:
    """One image to draw."""

    prompt: str
    seed: int
    settings: SamplingSettings


def plan_jobs(
    prompts: Sequence[str], first_seed: int, count: int, settings: Iterable[SamplingSettings]
) -> list[DrawJob]:
    """`count` images of each prompt for each settings, with the seeds first_seed, first_seed + 1, …

    The same seeds serve all prompts and sizes, so that what differs between images is what was asked to differ.
    """
    seeds = range(first_seed, first_seed + count)
    return [DrawJob(prompt, seed, one) for one in settings for prompt in prompts for seed in seeds]


def draw_jobs(
    pipeline: HDMPipeline,
    jobs: Sequence[DrawJob],
    *,
    image: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[DrawJob, Tensor]]:
    """Draw jobs in batches of equal settings, all started from `image` if there is one.

    Calls `progress` with (solver steps done, in all); yields each job with its image, uint8 (3, H, W).
    """
    batches = list(_batches(jobs, pipeline.max_batch))
    total, before = sum(batch[0].settings.steps for batch in batches), 0
    for batch in batches:
        settings, start = batch[0].settings, before
        given = None if image is None else read_image(image, settings).expand(len(batch), -1, -1, -1)

        def report(done: int, _steps: int, start: int = start) -> None:
            if progress is not None:
                progress(start + done, total)

        images = pipeline.draw(
            [job.prompt for job in batch],
            [job.seed for job in batch],
            settings,
            images=given,
            progress=report,
        )
        before += settings.steps
        yield from zip(batch, images, strict=True)


def _batches(jobs: Sequence[DrawJob], size: int) -> Iterator[list[DrawJob]]:
    for _, group in itertools.groupby(jobs, key=lambda job: job.settings):
        waiting = list(group)
        for start in range(0, len(waiting), size):
            yield waiting[start : start + size]


class ImageWriter:
    """Writes images to a folder, made if missing, numbered on from those already there.

    `model` (a path), `fingerprint` (SHA-256 of its weights), `image` (what the others start from) and `loaded_with`
    (precision and encoders) stand in the records, `loras` (see `ImageRecord`) too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: str,
        fingerprint: str,
        image: Path | None = None,
        loaded_with: Mapping[str, str] | None = None,
        loras: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.model = model
        self.fingerprint = fingerprint
        self.image = image
        self.image_sha256 = sha256_of(image) if image else None
        self.loaded_with = loaded_with or {}
        self.loras = loras
        self.paths: list[Path] = []
        self._sheet: list[tuple[Tensor, str]] = []
        self._first = self._next = next_number(folder)

    def add(self, job: DrawJob, image: Tensor) -> Path:
        """Write one image, uint8 (3, H, W), with its record."""
        record = ImageRecord(
            job.prompt,
            job.seed,
            job.settings,
            self.model,
            self.fingerprint,
            None if self.image is None else str(self.image),
            self.image_sha256,
            self.loaded_with,
            self.loras,
        )
        path = self._write(f"{slug(job.prompt)}-{job.seed}.png", image, record)
        self._next += 1
        self.paths.append(path)
        self._sheet.append((image, f"{job.prompt} [{job.seed}]"))
        return path

    def _write(self, name: str, image: Tensor, record: ImageRecord) -> Path:
        """Write an image under a name that no other has, not even of another process that draws into this folder."""
        while True:
            path = self.folder / f"{self._next:04d}-{name}"
            try:
                write_png(path, image, record)
            except FileExistsError:
                self._next = max(self._next + 1, next_number(self.folder))
            else:
                return path

    def differences_from(self, record: ImageRecord) -> list[str]:
        """What is drawn from other files, or with other weights of LoRAs, than an earlier record's image."""
        pairs: list[tuple[str, Any, Any]] = [
            (f"model {self.model}", self.fingerprint, record.fingerprint),
            (f"image {self.image}", self.image_sha256, record.image_sha256),
        ]
        found = [f"{what} is not the one that it was drawn with" for what, ours, theirs in pairs if ours != theirs]
        ours, theirs = list(map(_use, self.loras)), list(map(_use, record.loras))
        found += [f"it was not drawn with {_named(use)}" for use in ours if use not in theirs]
        return found + [f"{_named(use)}, which it was drawn with, is left out" for use in theirs if use not in ours]

    def write_sheet(self) -> Path:
        """Write the contact sheet of all images added."""
        images, captions = zip(*self._sheet, strict=True)
        sheet = contact_sheet([to_pil(image) for image in images], captions)
        for number in itertools.count(1):
            path = self.folder / f"sheet-{self._first:04d}{f'-{number}' * (number > 1)}.png"
            with suppress(FileExistsError):
                write_atomically(path, lambda file: sheet.save(file, "PNG"), new=True)
                break
        return path


def _use(lora: Mapping[str, Any]) -> tuple[str, float, str | None]:
    """Name, weight and SHA-256 of a record's LoRA."""
    return lora["name"], float(lora["weight"]), lora.get("sha256")


def _named(use: tuple[str, float, str | None]) -> str:
    name, weight, sha256 = use
    return f"LoRA {name}:{weight:g}" + (f" ({sha256[:8]})" if isinstance(sha256, str) else "")


def next_number(folder: Path) -> int:
    """The number after the highest one that begins a PNG's name in the folder."""
    names = (re.match(r"(\d+)-", path.name) for path in folder.glob("*.png"))
    return max((int(match[1]) + 1 for match in names if match), default=0)


def slug(prompt: str) -> str:
    """A prompt as part of a file name: letters and digits of any script, joined with dashes, of a bounded length."""
    words = re.sub(r"[^\w]+", "-", prompt[: 8 * SLUG_LENGTH].lower(), flags=re.UNICODE).strip("-_")
    short = words[:SLUG_LENGTH].encode()[:SLUG_BYTES].decode(errors="ignore")
    return short.rstrip("-") or "empty"
