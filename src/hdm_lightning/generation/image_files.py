"""Image files: PNGs that record the settings they were generated with, and start images.

Shapes: H×W pixels.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from hdm_lightning.data.as_shown import orientation, turned
from hdm_lightning.data.decode import MAX_FILE_BYTES, decode_rgb, load_upright, upright_size
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.errors import UserError
from hdm_lightning.generation.sampling_settings import MAX_SEED, SamplingSettings
from hdm_lightning.json_files import parse_object
from hdm_lightning.regular_files import open_regular, read_regular
from hdm_lightning.version import __version__
from hdm_lightning.whole_files import write_atomically

RECORD_FORMAT = "hdm-lightning image 1"
RECORD_KEY = "hdm-lightning"
PRECISIONS = ("float32", "bfloat16", "float16")
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
"""Formats in which a pipeline returns images; "latent" returns the latents undecoded."""

T = TypeVar("T")


@dataclass(frozen=True)
class ImageRecord:
    """Everything needed to generate an image again.

    Args:
        prompt: its prompt.
        seed: seed of its noise and routing.
        settings: its sampling settings.
        model: path of the model as the user gave it.
        fingerprint: SHA-256 of the model's weights.
        image: path of the start image (image-to-image), or None.
        image_sha256: SHA-256 of that file.
        loaded_with: `precision`, and `text_encoder` and `vae` if they replaced the model's own.
        loras: the adapters used: `name`, `weight` and `sha256` of each.
    """

    prompt: str
    seed: int
    settings: SamplingSettings
    model: str
    fingerprint: str
    image: str | None = None
    image_sha256: str | None = None
    loaded_with: Mapping[str, str] = field(default_factory=dict)
    loras: Sequence[Mapping[str, Any]] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        own = {**vars(self), "settings": self.settings.to_json(), "loaded_with": dict(self.loaded_with)}
        own["loras"] = [dict(each) for each in self.loras]
        return {"format": RECORD_FORMAT, "version": __version__, **own}

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> "ImageRecord":
        """Read the record that `to_json` wrote.

        Raises:
            ValueError: it has another format, or a setting is unknown or out of range.
        """
        if mapping.get("format") != RECORD_FORMAT:
            raise ValueError(f"format: got {mapping.get('format')!r}, expected {RECORD_FORMAT!r}")
        _require_kinds(mapping)
        return cls(
            prompt=mapping["prompt"],
            seed=mapping["seed"],
            settings=SamplingSettings.from_json(mapping["settings"]),
            model=mapping["model"],
            fingerprint=mapping["fingerprint"],
            image=mapping["image"],
            image_sha256=mapping["image_sha256"],
            loaded_with=mapping.get("loaded_with", {}),
            loras=tuple(mapping.get("loras", ())),
        )


def _require_kinds(mapping: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the key, if a value of a record has the wrong type."""
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("prompt", "model", "fingerprint"), str),
        **dict.fromkeys(("image", "image_sha256"), (str, type(None))),
        "seed": int,
        "settings": dict,
    }
    if "loras" in mapping:
        kinds["loras"] = (list, tuple)
    loaded_with = mapping.get("loaded_with", {})
    for key, kind in kinds.items():
        if key not in mapping or not isinstance(mapping[key], kind) or isinstance(mapping[key], bool):
            raise ValueError(f"{key}: got {mapping.get(key)!r}")
    if not 0 <= mapping["seed"] <= MAX_SEED:
        raise ValueError(f"seed: got {mapping['seed']}, expected 0 … 2⁶³ − 1")
    if not isinstance(loaded_with, dict) or not all(isinstance(value, str) for value in loaded_with.values()):
        raise ValueError(f"loaded_with: got {loaded_with!r}, expected a mapping of strings to strings")
    if not all(_is_use(each) for each in mapping.get("loras", ())):
        raise ValueError(f"loras: got {mapping['loras']!r}, expected a name and a weight for each")
    if loaded_with.get("precision", "float32") not in PRECISIONS:
        raise ValueError(f"precision: got {loaded_with['precision']!r}, expected one of {', '.join(PRECISIONS)}")


def _is_use(lora: Any) -> bool:
    """Return whether a record's entry has the name and the weight of a LoRA."""
    if not isinstance(lora, dict):
        return False
    weight = lora.get("weight")
    try:
        return isinstance(lora.get("name"), str) and isinstance(weight, int | float) and isfinite(weight)
    except OverflowError:  # an integer beyond the range of floats
        return False


def to_uint8(image: Tensor) -> Tensor:
    """Convert images in [−1, 1] to uint8."""
    return ((image.float() + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Convert a uint8 tensor (3, H, W) to a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def write_png(path: Path, image: Tensor, record: ImageRecord) -> None:
    """Write uint8 (3, H, W) atomically, with its record as JSON in "hdm-lightning" and the prompt in "Description".

    Raises FileExistsError: a file of this name exists.
    """
    text = PngImagePlugin.PngInfo()
    text.add_itxt(RECORD_KEY, json.dumps(record.to_json(), ensure_ascii=False))
    text.add_itxt("Description", record.prompt)
    text.add_text("Software", "hdm-lightning")
    write_atomically(path, lambda file: to_pil(image).save(file, format="PNG", pnginfo=text), new=True)


def read_record(path: Path) -> ImageRecord:
    """Read the record from an image that `write_png` wrote. Raises UserError: the file is not such an image."""
    text = _record_text(path)
    if text is None:
        raise UserError(
            "contains no settings",
            where=str(path),
            hint="use a PNG written by hdm-sample and not re-encoded since",
        )
    try:
        return ImageRecord.from_json(parse_object(text))
    except (ValueError, KeyError, TypeError) as error:
        hint = "use a PNG written by hdm-sample, or pass its prompt and options"
        raise UserError(f"contains settings that cannot be read ({error})", where=str(path), hint=hint) from error


def _record_text(path: Path) -> str | bytes | None:
    """Return the text stored under `RECORD_KEY`: before the pixels, or after them if another program moved it."""
    try:
        with (
            open(path, "rb", opener=open_regular) as file,
            warnings.catch_warnings(action="ignore"),  # about large images
            Image.open(file) as image,
        ):
            if RECORD_KEY not in image.info:
                image.load()
            found = image.info.get(RECORD_KEY)
    except Exception as error:  # Pillow can raise anything on a damaged file
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        reason = "not an image file" if isinstance(error, UnidentifiedImageError) else reason
        hint = "use a PNG written by hdm-sample"
        raise UserError(f"cannot be read as an image ({reason})", where=str(path), hint=hint) from error
    return found if isinstance(found, str | bytes) else None


def read_image(path: Path, settings: SamplingSettings) -> Tensor:
    """Read a start image as uint8 (1, 3, H, W), scaled and center-cropped to the size in the settings.

    It is read as in training: transparency on white, upright. Raises UserError: it cannot be read.
    """
    return fitted(_read(path, load_upright), settings)


def upright(image: Image.Image) -> Image.Image:
    """Convert an image as training does: transparency on white, upright, RGB. Raises SampleFault: undecodable."""
    return turned(decode_rgb(image), orientation(image))


def fitted(image: Image.Image, settings: SamplingSettings) -> Tensor:
    """Convert an image to uint8 (1, 3, H, W), scaled and center-cropped to the size in the settings."""
    size = (settings.width, settings.height)
    scaled = ImageOps.fit(image, size, method=Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, settings.height, settings.width, 3).permute(0, 3, 1, 2)


def start_size(image: Image.Image | Tensor | None) -> dict[str, int]:
    """Return `width` and `height` of an upright start image or of a batch (B, 3, H, W); empty if there is none."""
    if isinstance(image, Image.Image):
        return {"width": image.width, "height": image.height}
    return {} if image is None else dict(zip(("height", "width"), image.shape[-2:], strict=False))


def start_images(image: Image.Image | Tensor | None, settings: SamplingSettings, count: int) -> Tensor | None:
    """Return the start images of `count` images, uint8 (B, 3, H, W); a PIL image must be upright RGB."""
    if isinstance(image, Image.Image):
        image = fitted(image, settings)
    return image.expand(count, -1, -1, -1) if image is not None and len(image) == 1 else image


def converted(images: Tensor, output_type: str) -> Any:
    """Convert images (B, 3, H, W) in [−1, 1] to `output_type`."""
    if output_type == "pil":
        return [to_pil(image) for image in to_uint8(images).cpu()]
    images = (images + 1.0) / 2.0
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image as displayed, in pixels.

    Raises:
        UserError: the file cannot be read as an image.
    """
    height, width = _read(path, upright_size)
    return width, height


def is_cropped(path: Path, settings: SamplingSettings) -> bool:
    """Return whether `read_image` cuts off at least one row or column of the scaled image."""
    width, height = image_size(path)
    scale = max(settings.width / width, settings.height / height)
    return width * scale >= settings.width + 1 or height * scale >= settings.height + 1


def sha256_of(*files: Path) -> str:
    """Return the SHA-256 of one file in hexadecimal digits; of several, the hash of their hashes in this order."""
    hashes = []
    for path in files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _read(path: Path, reader: Callable[[bytes], T]) -> T:
    try:
        return reader(read_regular(path, MAX_FILE_BYTES))
    except (OSError, SampleFault) as error:
        hint = "use an undamaged image in a common format"
        raise UserError(f"cannot be read as an image ({error})", where=str(path), hint=hint) from error
