"""Pictures as PNG files that carry the record of their making.

Shapes: H×W pixels.
"""

import json
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.generation.record import ImageRecord
from hdm_lightning.whole_files import write_atomically

RECORD_KEY = "hdm-lightning"


def to_pil(image: Tensor) -> Image.Image:
    """A uint8 tensor (3, H, W) as a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def write_png(path: Path, image: Tensor, record: ImageRecord) -> None:
    """Write a picture with its record, whole or not at all.

    Args:
        path: file to write, replaced if there.
        image: uint8 (3, H, W).
        record: kept as JSON under "hdm-lightning"; the prompt also under PNG's own "Description".
    """
    text = PngImagePlugin.PngInfo()
    text.add_itxt(RECORD_KEY, json.dumps(record.to_json(), ensure_ascii=False))
    text.add_itxt("Description", record.prompt)
    text.add_text("Software", "hdm-lightning")
    write_atomically(path, lambda file: to_pil(image).save(file, format="PNG", pnginfo=text))


def read_record(path: Path) -> ImageRecord:
    """The record of a picture that `write_png` wrote.

    Raises:
        UserError: if the file is no such picture.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(RECORD_KEY)
    except OSError as error:
        raise UserError(f"cannot be read as an image ({error})", where=str(path)) from error
    if text is None:
        raise UserError(
            "carries no settings",
            where=str(path),
            hint="give a PNG written by hdm-sample, not re-encoded since",
        )
    try:
        return ImageRecord.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"carries settings that cannot be read ({error})", where=str(path)) from error
