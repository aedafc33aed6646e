"""The picture that image-to-image starts from, read as training reads its pictures: transparency on white, upright.

Shapes: H×W pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image, ImageOps
from torch import Tensor

from hdm_lightning.data.decode import load_upright, upright_size
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.errors import UserError
from hdm_lightning.generation.settings import SamplingSettings

T = TypeVar("T")


def read_image(path: Path, settings: SamplingSettings) -> Tensor:
    """A picture as uint8 (1, 3, H, W), scaled and cropped about its centre to the size of the settings.

    Raises:
        UserError: if the file cannot be read as an image.
    """
    size = (settings.width, settings.height)
    fitted = ImageOps.fit(_read(path, load_upright), size, method=Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, settings.height, settings.width, 3).permute(0, 3, 1, 2)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as it is seen, in pixels.

    Raises:
        UserError: if the file cannot be read as an image.
    """
    height, width = _read(path, upright_size)
    return width, height


def is_cropped(path: Path, settings: SamplingSettings) -> bool:
    """Whether `read_image` cuts off a row or a column of the picture, as scaled, or more."""
    width, height = image_size(path)
    scale = max(settings.width / width, settings.height / height)
    return width * scale >= settings.width + 1 or height * scale >= settings.height + 1


def _read(path: Path, reader: Callable[[bytes], T]) -> T:
    try:
        return reader(path.read_bytes())
    except (OSError, SampleFault) as error:
        raise UserError(f"cannot be read as an image ({error})", where=str(path)) from error
