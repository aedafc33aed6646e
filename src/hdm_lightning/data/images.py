"""Bytes to upright RGB images: formats, limits, kinds of pixels, EXIF turns.

Transparent images are laid on white; of animations the first frame counts. Whatever a damaged file makes a decoder
raise becomes a `SampleFault`.
"""

import io

import numpy as np
from PIL import Image, ImageFile

from hdm_lightning.data.faults import SampleFault

MAX_PIXELS = 89_478_485
"""Largest image that is decoded: a quarter of a gigabyte as RGB (Pillow's own bound)."""

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
_SIDEWAYS = (5, 6, 7, 8)


def open_image(data: bytes) -> ImageFile.ImageFile:
    """The image behind its header, not yet decoded.

    Raises:
        SampleFault: the bytes are no image of a known format, or one with too many pixels.
    """
    if not data:
        raise SampleFault("empty image")
    try:
        image = Image.open(io.BytesIO(data), formats=(format_of(data),))
    except SampleFault:
        raise
    except Exception as error:
        raise SampleFault(f"undecodable image: unreadable header ({type(error).__name__})") from error
    if image.width * image.height > MAX_PIXELS:
        raise SampleFault(f"too many pixels: {image.width}x{image.height}")
    image.decodermaxblock = len(data)  # in one piece: a JPEG decoder that waits for more repeats its row of blocks
    return image


def decode_rgb(image: Image.Image) -> Image.Image:
    """The pixels of an opened image as 8-bit RGB, not yet turned.

    Raises:
        SampleFault: they cannot be decoded.
    """
    try:
        return _to_rgb(image)
    except Exception as error:
        raise SampleFault(f"undecodable image: {type(error).__name__}: {error}") from error


def load_upright(data: bytes) -> Image.Image:
    """The whole image at its own size, upright, 8-bit RGB.

    Raises:
        SampleFault: the bytes are no image that can be used.
    """
    image = open_image(data)
    return turned(decode_rgb(image), orientation(image))


def upright_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels of the image as it is to be seen, from its header.

    Raises:
        SampleFault: the bytes are no image that can be used.
    """
    image = open_image(data)
    return (image.width, image.height) if is_sideways(orientation(image)) else (image.height, image.width)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block can raise anything, and matters little
        return 1


def is_sideways(turn: int) -> bool:
    """Whether an EXIF orientation changes height and width."""
    return turn in _SIDEWAYS


def turned(image: Image.Image, turn: int) -> Image.Image:
    """An image put upright, by its EXIF orientation."""
    return image.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else image


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    grey = np.clip(np.rint(values if image.mode == "F" else values / 257), 0, 255)
    if isinstance(see_through := image.info.get("transparency"), int):  # one level of grey that stands for nothing
        grey[values == see_through] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
