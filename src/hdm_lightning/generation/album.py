"""A folder of drawn pictures: numbered PNGs with their records, and a contact sheet of them."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hdm_lightning.generation.contact_sheet import contact_sheet
from hdm_lightning.generation.fingerprints import sha256_of
from hdm_lightning.generation.jobs import DrawJob
from hdm_lightning.generation.png import to_pil, write_png
from hdm_lightning.generation.record import ImageRecord
from hdm_lightning.whole_files import write_atomically

SLUG_LENGTH = 48


class Album:
    """Writes pictures to a folder, numbered on from those already there.

    Args:
        folder: made if missing.
        model: path of the model, for the records.
        fingerprint: SHA-256 of its weights.
        image: picture that the others start from, or None.
        loaded_with: precision and encoders, for the records.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: str,
        fingerprint: str,
        image: Path | None = None,
        loaded_with: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.model = model
        self.fingerprint = fingerprint
        self.image = image
        self.image_sha256 = sha256_of(image) if image else None
        self.loaded_with = loaded_with or {}
        self.paths: list[Path] = []
        self._sheet: list[tuple[Tensor, str]] = []
        self._first = self._next = next_number(folder)

    def add(self, job: DrawJob, picture: Tensor) -> Path:
        """Write one picture, uint8 (3, H, W), with its record."""
        record = ImageRecord(
            job.prompt,
            job.seed,
            job.settings,
            self.model,
            self.fingerprint,
            None if self.image is None else str(self.image),
            self.image_sha256,
            self.loaded_with,
        )
        path = self.folder / f"{self._next:04d}-{slug(job.prompt)}-{job.seed}.png"
        write_png(path, picture, record)
        self._next += 1
        self.paths.append(path)
        self._sheet.append((picture, f"{job.prompt} [{job.seed}]"))
        return path

    def differences_from(self, record: ImageRecord) -> list[str]:
        """The files that are not those of an earlier record."""
        pairs = [
            (f"model {self.model}", self.fingerprint, record.fingerprint),
            (f"picture {self.image}", self.image_sha256, record.image_sha256),
        ]
        return [what for what, ours, theirs in pairs if ours != theirs]

    def write_sheet(self) -> Path:
        """Write the contact sheet of all pictures added."""
        pictures, captions = zip(*self._sheet, strict=True)
        path = self.folder / f"sheet-{self._first:04d}.png"
        sheet = contact_sheet([to_pil(picture) for picture in pictures], captions)
        write_atomically(path, lambda file: sheet.save(file, "PNG"))
        return path


def next_number(folder: Path) -> int:
    """The number after the highest one that begins a PNG's name in the folder."""
    names = (re.match(r"(\d+)-", path.name) for path in folder.glob("*.png"))
    return max((int(match[1]) + 1 for match in names if match), default=0)


def slug(prompt: str) -> str:
    """A prompt as part of a file name: letters and digits of any script, joined with dashes."""
    words = re.sub(r"[^\w]+", "-", prompt.lower(), flags=re.UNICODE).strip("-_")
    return words[:SLUG_LENGTH].rstrip("-") or "empty"
