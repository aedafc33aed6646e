"""Bytes of an image to the RGB pixels of its crop, reading no more detail than the crop needs.

Formats, limits, kinds of pixels and EXIF turns: transparent images are laid on white; of animations the first frame
counts; whatever a damaged file makes a decoder raise becomes a `SampleFault`. A JPEG is decoded at a reduced scale
(1/2, 1/4, 1/8 of its size) that still leaves the resize something to average, by libjpeg-turbo straight into an array.
The resize is bicubic with antialiasing, by whichever of torch and Pillow does less work: torch's vectorized kernel for
8-bit images gives the same pixels as Pillow's (within one level, where rounding differs) four times as fast, but
resizes the whole image; Pillow resizes only the part that is shown.

Shapes: H×W pixels of an image, h×w of the crop.
"""

import io
from collections.abc import Callable
from math import ceil

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile

from hdm_lightning.data.crops import Crop
from hdm_lightning.data.faults import SampleFault

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
    if is_jpeg := image.format in ("JPEG", "MPO"):  # MPO: phones put a second image behind the first
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
    kind = format_of(data)
    try:
        image = Image.open(io.BytesIO(data), formats=(kind,))
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
    """Pillow's name of the format, by the first bytes.

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


def decode_jpeg(data: bytes, header: ImageFile.ImageFile, scale: int) -> NDArray[np.uint8] | None:
    """The pixels of an intact RGB JPEG at a reduced scale.

    Args:
        data: the file.
        header: the same file as Pillow opened it, not loaded.
        scale: divisor of the sides: 1, 2, 4 or 8.

    Returns:
        uint8 (H,W,3), RGB, with sides ceil(side / scale); None where Pillow has to decide: another kind of pixels
        (grey, CMYK), or a file that makes the decoder complain.
    """
    if header.mode != "RGB":
        return None
    height, width = ceil(header.height / scale), ceil(header.width / scale)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


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
