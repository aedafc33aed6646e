"""Bytes of an image to the RGB pixels of its crop, reading no more detail than the crop needs.

A JPEG is decoded at a reduced scale (1/2, 1/4, 1/8 of its size) that still leaves the resize something to average.
Transparent images are laid on white; turned ones (EXIF) are put upright; of animations the first frame counts.

Shapes: H×W pixels of the crop.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdm_lightning.data.crops import Crop
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.resizing import cut

MAX_PIXELS = 89_478_485
"""Largest image that is decoded: a quarter of a gigabyte as RGB (Pillow's own bound)."""

REDUCTIONS = {8: 2.2, 4: 1.75, 2: 1.5}
"""Scales at which a JPEG is decoded, and how much larger than the target the result must be.

Scaling in the DCT domain alone differs from a bicubic resize by 1.6 grey levels (mean) on a photograph; with these
margins the difference is about 1 at most.
"""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)


def decode(data: bytes, choose: Callable[[int, int], Crop]) -> tuple[NDArray[np.uint8], Crop]:
    """The pixels of the crop that `choose(height, width)` names for the upright image.

    Returns:
        uint8 (3,H,W), RGB, and the crop.

    Raises:
        SampleFault: the bytes are no image that can be used.
    """
    image = _open(data)
    turn, scale = _turn(image), 1
    try:
        width, height = image.size
        crop = choose(width, height) if turn in _TURNED else choose(height, width)
        if image.format == "JPEG":
            full = (crop.full_height, crop.full_width)
            scale = _reduce(image, *(full[::-1] if turn in _TURNED else full), exactly=turn != 1)
        image = to_rgb(image)
    except SampleFault:
        raise
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise SampleFault(f"undecodable image: {type(error).__name__}: {error}") from error
    if turn in _UPRIGHT:
        return cut(image.transpose(_UPRIGHT[turn]), crop), crop
    return cut(image, crop, seen=(height / scale, width / scale)), crop


def upright_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels of the image as it is to be seen, from its header.

    Raises:
        SampleFault: the bytes are no image that can be used.
    """
    image = _open(data)
    width, height = image.size
    return (width, height) if _turn(image) in _TURNED else (height, width)


def load_upright(data: bytes) -> Image.Image:
    """The whole image at its own size, upright, 8-bit RGB.

    Raises:
        SampleFault: the bytes are no image that can be used.
    """
    image = _open(data)
    turn = _turn(image)
    try:
        image = to_rgb(image)
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise SampleFault(f"undecodable image: {type(error).__name__}: {error}") from error
    return image.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB: transparency on white, 16-bit grey scaled down, CMYK and palettes converted."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image)
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if image.mode != "F":
        values = values / 257.0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")


def _open(data: bytes) -> Image.Image:
    if not data:
        raise SampleFault("empty image")
    try:
        image = Image.open(io.BytesIO(data), formats=(format_of(data),))
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise SampleFault(f"undecodable image: unreadable header ({type(error).__name__})") from error
    if image.width * image.height > MAX_PIXELS:
        raise SampleFault(f"too many pixels: {image.width}x{image.height}")
    return image


def format_of(data: bytes) -> str:
    """Pillow's name of the format that the first bytes tell.

    Raises:
        SampleFault: it is none that is read here.
    """
    if data.startswith(b"\xff\xd8"):
        return "JPEG"
    if data.startswith(b"\x89PNG"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"GIF8"):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    raise SampleFault("undecodable image: not JPEG, PNG, WebP, GIF, BMP or AVIF")


def _reduce(image: Image.Image, height: int, width: int, *, exactly: bool) -> int:
    """Let a JPEG be decoded at the smallest scale that serves a target of this size, before it is turned.

    Args:
        image: opened, not loaded.
        height, width: the target.
        exactly: only at scales that divide the sides, so that no pixel is seen in part.

    Returns:
        The divisor of the sides.
    """
    for scale, margin in REDUCTIONS.items():
        enough = image.height >= scale * margin * height and image.width >= scale * margin * width
        if enough and not (exactly and (image.height % scale or image.width % scale)):
            image.draft("RGB", (image.width // scale, image.height // scale))
            return scale
    return 1


def _turn(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, OSError, KeyError, OverflowError):
        return 1
