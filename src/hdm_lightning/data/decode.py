"""Bytes of an image to the RGB pixels of its crop, reading no more detail than the crop needs.

A JPEG is decoded at a reduced scale (1/2, 1/4, 1/8 of its size) that still leaves the resize something to average.

Shapes: H×W pixels of the crop.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdm_lightning.data.crops import Crop
from hdm_lightning.data.images import decode_rgb, is_sideways, open_image, orientation, turned
from hdm_lightning.data.jpeg import decode_jpeg
from hdm_lightning.data.resizing import cut

REDUCTIONS = {8: 2.2, 4: 1.75, 2: 1.5}
"""Scales at which a JPEG is decoded, and how much larger than the target the result must be.

Scaling in the DCT domain alone differs from a bicubic resize by 1.6 grey levels (mean) on a photograph; with these
margins the difference is about 1 at most.
"""


def decode(data: bytes, choose: Callable[[int, int], Crop]) -> tuple[NDArray[np.uint8], Crop]:
    """The pixels of the crop that `choose(height, width)` names for the upright image.

    Returns:
        uint8 (3,H,W), RGB, and the crop.

    Raises:
        SampleFault: the bytes are no image that can be used, or `choose` refuses it.
    """
    image = open_image(data)
    turn, scale = orientation(image), 1
    height, width = image.height, image.width
    crop = choose(width, height) if is_sideways(turn) else choose(height, width)
    if is_jpeg := image.format in ("JPEG", "MPO"):  # MPO: phones put a second picture behind the first
        full = (crop.full_height, crop.full_width)
        scale = reduction(height, width, *(full[::-1] if is_sideways(turn) else full), exactly=turn != 1)
    if turn != 1:
        return cut(np.array(turned(_with_pillow(image, scale), turn)), crop), crop
    pixels = decode_jpeg(data, image, scale) if is_jpeg else None
    if pixels is None:
        pixels = np.array(_with_pillow(image, scale))
    return cut(pixels, crop, seen=(height / scale, width / scale)), crop


def _with_pillow(image: Image.Image, scale: int) -> Image.Image:
    if scale > 1:
        image.draft("RGB", (image.width // scale, image.height // scale))
    return decode_rgb(image)


def reduction(height: int, width: int, full_height: int, full_width: int, *, exactly: bool = False) -> int:
    """The divisor of the sides at which a JPEG is decoded.

    Args:
        height, width: sides of the JPEG in pixels.
        full_height, full_width: sides that it will be resized to, the same way up.
        exactly: only divisors of both sides, so that no pixel is seen in part.

    Returns:
        The largest of 1, 2, 4 and 8 that leaves the resize enough to average.
    """
    for scale, margin in REDUCTIONS.items():
        enough = height >= scale * margin * full_height and width >= scale * margin * full_width
        if enough and not (exactly and (height % scale or width % scale)):
            return scale
    return 1
