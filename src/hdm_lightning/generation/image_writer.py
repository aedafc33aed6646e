"""Plan many images, generate them in batches of equal settings, and write each one as soon as it is done."""

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
"""Limits in characters and in UTF-8 bytes; file systems allow names of 143 to 255 bytes."""


@dataclass(frozen=True)
class DrawJob:
    """One image to generate."""

    prompt: str
    seed: int
    settings: SamplingSettings


def plan_jobs(
    prompts: Sequence[str], first_seed: int, count: int, settings: Iterable[SamplingSettings]
) -> list[DrawJob]:
    """Plan `count` images for each prompt and settings, with the seeds first_seed, first_seed + 1, …

    All prompts and sizes use the same seeds, so images differ only where they were asked to.
    """
    seeds = range(first_seed, first_seed + count)
    return [DrawJob(prompt, seed, one) for one in settings for prompt in prompts for seed in seeds]


def draw_jobs(
    pipeline: HDMPipeline,
    jobs: Sequence[DrawJob],
    *,
    image: Path | None,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[DrawJob, Tensor]]:
    """Generate images in batches of equal settings, all started from `image` if there is one.

    Calls `progress` with (solver steps done, total steps); yields each job with its image, uint8 (3, H, W).
    """
    batches = list(_batches(jobs, pipeline.max_batch))
    total, before = sum(batch[0].settings.steps for batch in batches), 0
    for batch in batches:
        settings, start = batch[0].settings, before
        given = None if image is None else read_image(image, settings).expand(len(batch), -1, -1, -1)

        def report(done: int, _steps: int, start: int = start) -> None:
            progress(start + done, total)

        prompts, seeds = [job.prompt for job in batch], [job.seed for job in batch]
        images = pipeline.draw(prompts, seeds, settings, images=given, progress=report)
        before += settings.steps
        yield from zip(batch, images, strict=True)


def _batches(jobs: Sequence[DrawJob], size: int) -> Iterator[list[DrawJob]]:
    for _, group in itertools.groupby(jobs, key=lambda job: job.settings):
        waiting = list(group)
        for start in range(0, len(waiting), size):
            yield waiting[start : start + size]


class ImageWriter:
    """Writes images to a folder, created if missing, and continues the numbering of those already there.

    `model` (a path), `fingerprint` (SHA-256 of its weights), `image` (the start image), `loaded_with` (precision and
    encoders) and `loras` go into the records; see `ImageRecord`.
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
        self._common: dict[str, Any] = {
            "model": model,
            "fingerprint": fingerprint,
            "image": str(image) if image else None,
            "image_sha256": sha256_of(image) if image else None,
            "loaded_with": loaded_with or {},
            "loras": loras,
        }
        self.paths: list[Path] = []
        self._sheet: list[tuple[Tensor, str]] = []
        self._first = self._next = next_number(folder)

    def add(self, job: DrawJob, image: Tensor) -> Path:
        """Write one image, uint8 (3, H, W), with its record."""
        record = ImageRecord(job.prompt, job.seed, job.settings, **self._common)
        path = self._write(f"{slug(job.prompt)}-{job.seed}.png", image, record)
        self._next += 1
        self.paths.append(path)
        self._sheet.append((image, f"{job.prompt} [{job.seed}]"))
        return path

    def _write(self, name: str, image: Tensor, record: ImageRecord) -> Path:
        """Write an image under a new name, even if another process writes to this folder at the same time."""
        while True:
            path = self.folder / f"{self._next:04d}-{name}"
            try:
                write_png(path, image, record)
            except FileExistsError:
                self._next = max(self._next + 1, next_number(self.folder))
            else:
                return path

    def differences_from(self, record: ImageRecord) -> list[str]:
        """Describe how the files and LoRA weights differ from those of an earlier record."""
        own = self._common
        pairs = [
            (f"model {own['model']}", own["fingerprint"], record.fingerprint),
            (f"image {own['image']}", own["image_sha256"], record.image_sha256),
        ]
        found = [f"{what} is not the one it was generated with" for what, ours, theirs in pairs if ours != theirs]
        used, before = list(map(_use, own["loras"])), list(map(_use, record.loras))
        found += [f"it was generated without {_named(use)}" for use in used if use not in before]
        return found + [f"it was generated with {_named(use)}, now missing" for use in before if use not in used]

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
    """Return name, weight and SHA-256 of a LoRA in a record."""
    return lora["name"], float(lora["weight"]), lora.get("sha256")


def _named(use: tuple[str, float, str | None]) -> str:
    name, weight, sha256 = use
    return f"LoRA {name}:{weight:g}" + (f" ({sha256[:8]})" if isinstance(sha256, str) else "")


def next_number(folder: Path) -> int:
    """Return the number after the highest one at the start of a PNG's name in the folder."""
    names = (re.match(r"(\d+)-", path.name) for path in folder.glob("*.png"))
    return max((int(match[1]) + 1 for match in names if match), default=0)


def slug(prompt: str) -> str:
    """Turn a prompt into part of a file name: letters and digits of any script, joined with dashes, cut to a limit."""
    words = re.sub(r"[^\w]+", "-", prompt[: 8 * SLUG_LENGTH].lower(), flags=re.UNICODE).strip("-_")
    short = words[:SLUG_LENGTH].encode()[:SLUG_BYTES].decode(errors="ignore")
    return short.rstrip("-") or "empty"
