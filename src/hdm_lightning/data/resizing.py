"""Resizing to a crop: bicubic with antialiasing, by whichever of torch and Pillow does less work.

torch's vectorised kernel for 8-bit images gives the same pixels as Pillow's (within one level, where rounding
differs) four times as fast, but resizes the whole image; Pillow resizes only the part that is shown.

Shapes: H×W pixels of the image, h×w of the crop.
"""

from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hdm_lightning.data.crops import Crop

PILLOW_COST = 4.0
"""Time of Pillow's resize per pixel, in units of torch's."""

REACH = 2
"""Pixels of the result that a shrinking bicubic filter reaches to each side."""


def cut(image: NDArray[np.uint8], crop: Crop, seen: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """The pixels of a crop of an upright RGB image.

    Args:
        image: (H,W,3), the full image at any scale.
        crop: what to show of it.
        seen: height and width of the part of `image`, from its upper left corner, that is the full image: a reduced
            JPEG of odd size has a last row and column that show only in part. None for all.

    Returns:
        uint8 (3,h,w), RGB; may be a view.
    """
    seen = seen or (float(image.shape[0]), float(image.shape[1]))
    left = crop.full_width - crop.left - crop.width if crop.flip else crop.left
    rows, columns = slice(crop.top, crop.top + crop.height), slice(left, left + crop.width)
    if seen == (crop.full_height, crop.full_width):
        pixels = image.transpose(2, 0, 1)[:, rows, columns]
    elif crop.full_height * crop.full_width > PILLOW_COST * crop.height * crop.width:
        pixels = _resize_part(image, crop, left, seen).transpose(2, 0, 1)
    else:
        pixels = _resize_up_to(image, rows.stop, columns.stop, crop, seen)[:, rows, columns]
    return pixels[:, :, ::-1] if crop.flip else pixels


def _resize_up_to(
    image: NDArray[np.uint8], bottom: int, right: int, crop: Crop, seen: tuple[float, float]
) -> NDArray[np.uint8]:
    scales = [full / part for full, part in zip((crop.full_height, crop.full_width), seen, strict=True)]
    height, rows = _needed(bottom, crop.full_height, scales[0])
    width, columns = _needed(right, crop.full_width, scales[1])
    pixels = torch.from_numpy(image[:rows, :columns]).permute(2, 0, 1)[None]
    # What `interpolate(..., mode="bicubic", antialias=True)` calls; only here size and scale can both be given.
    resized: torch.Tensor = torch.ops.aten._upsample_bicubic2d_aa(pixels, [height, width], False, *scales)
    return resized[0].numpy()


def _needed(end: int, full: int, scale: float) -> tuple[int, int | None]:
    """How far to resize one side so that its first `end` pixels are right, and how much of the image that takes.

    A side that is enlarged is resized whole: torch copies a side whose two sizes agree, whatever the scale.
    """
    return (end, ceil((end + REACH) / scale) + 1) if scale < 1 else (full, None)


def _resize_part(image: NDArray[np.uint8], crop: Crop, left: int, seen: tuple[float, float]) -> NDArray[np.uint8]:
    # The filter still sees the pixels around the box, so that the result is a part of the whole resize.
    scale_y, scale_x = seen[0] / crop.full_height, seen[1] / crop.full_width
    right, bottom = (left + crop.width) * scale_x, (crop.top + crop.height) * scale_y
    box = (left * scale_x, crop.top * scale_y, min(right, image.shape[1]), min(bottom, image.shape[0]))
    return np.asarray(Image.fromarray(image).resize((crop.width, crop.height), Image.Resampling.BICUBIC, box=box))
