"""From the bytes of an image to the RGB pixels of its crop, decoding no more detail than the crop needs.

Colors are converted to sRGB by the image's profile, rotated images are turned upright, transparent ones are composited
onto white, and animations are reduced to their first frame; any error of a decoder becomes a `SampleFault`. JPEGs are
decoded by libjpeg-turbo straight into an array, at a reduced scale (1/2, 1/4, 1/8 of the size) that still leaves the
resize something to average.
The resize is bicubic with antialiasing, by torch or Pillow, whichever does less work: torch's vectorized kernel for
8-bit images gives the same pixels as Pillow's (within one level, where rounding differs) four times as fast, but
resizes the whole image; Pillow resizes only the part that is shown.

Shapes: H×W pixels of an image, h×w of the crop.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from math import ceil

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from hdm_lightning.data.as_shown import (
    has_alpha,
    is_sideways,
    layers_to_srgb,
    orientation,
    pixels_to_srgb,
    profile_of,
    to_srgb,
    transform_of,
    turned,
)
from hdm_lightning.data.crops import Crop
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.image_headers import format_of, is_heavy, prepared

REDUCTIONS = {8: 2.2, 4: 1.75, 2: 1.5}
"""Divisors at which a JPEG can be decoded, and how many times larger than the target the result must then be.

Scaling in the DCT domain alone differs from a bicubic resize by 1.6 gray levels (mean) on a photograph; with these
margins the difference is at most about 1.
"""


def decode(data: bytes, choose: Callable[[int, int], Crop]) -> tuple[NDArray[np.uint8], Crop]:
    """Decode the pixels of the crop that `choose(height, width)` returns for the upright image.

    Returns:
        uint8 (3,h,w), RGB, and the crop.

    Raises:
        SampleFault: the bytes are not a usable image, or `choose` refuses it.
    """
    image = open_image(data)
    turn, scale = orientation(image), 1
    height, width = image.height, image.width
    crop = choose(width, height) if is_sideways(turn) else choose(height, width)
    if is_jpeg := image.format in ("JPEG", "MPO"):  # MPO: phones append a second image
        full = (crop.full_height, crop.full_width)
        scale = reduction(height, width, *(full[::-1] if is_sideways(turn) else full), exactly=turn != 1)
    if turn != 1:
        return cut(np.array(turned(_with_pillow(image, scale), turn)), crop), crop
    pixels = decode_jpeg(data, image, scale) if is_jpeg else None
    if pixels is None:
        pixels = np.array(_with_pillow(image, scale))
    elif profile := profile_of(image):
        pixels = pixels_to_srgb(pixels, profile)
    return cut(pixels, crop, seen=(height / scale, width / scale)), crop


def _with_pillow(image: Image.Image, scale: int) -> Image.Image:
    if scale > 1:
        image.draft("RGB", (image.width // scale, image.height // scale))
    return decode_rgb(image)


def reduction(height: int, width: int, full_height: int, full_width: int, *, exactly: bool = False) -> int:
    """Return the divisor of the sides at which to decode a JPEG.

    Args:
        height, width: sides of the JPEG in pixels.
        full_height, full_width: sides that it will be resized to, in the same orientation.
        exactly: accept only divisors of both sides, so that no pixel covers the image only in part.

    Returns:
        The largest of 1, 2, 4 and 8 that leaves the resize enough to average.
    """
    for scale, margin in REDUCTIONS.items():
        enough = height >= scale * margin * full_height and width >= scale * margin * full_width
        if enough and not (exactly and (height % scale or width % scale)):
            return scale
    return 1


MAX_PIXELS = 89_478_485
"""Maximum size of an image that is decoded: a quarter of a gigabyte as RGB (Pillow's own bound)."""

MAX_FILE_BYTES = 256 << 20
"""Maximum size of an image file."""

MAX_SCANS = 64
"""Maximum number of scans of a progressive JPEG: each costs a pass over all pixels; encoders write about ten."""

BAND_PIXELS = 1 << 22
"""Pixels that are converted at a time where the conversion takes several times their bytes."""

# Too many pixels are reported as a fault below, and damaged tags do not matter; Pillow's other warnings are shown.
# Set once, because `catch_warnings` around each image would change the filters of all threads.
for category in (Image.DecompressionBombWarning, UserWarning):
    warnings.filterwarnings("ignore", category=category, module=r"PIL\.")


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Open an image, reading its header but not its pixels.

    Raises:
        SampleFault: the format is unknown, the header is damaged, or the image is too large.
    """
    if not data:
        raise SampleFault("empty image")
    if len(data) > MAX_FILE_BYTES:
        raise SampleFault(f"image file too large: {len(data)} bytes")
    kind = format_of(data)
    header = prepared(data, kind)
    if kind == "TIFF" and is_heavy(data):
        raise SampleFault("undecodable image: its tags are larger than any camera's")
    try:
        image = Image.open(io.BytesIO(header.data), formats=(kind,))
    except Image.DecompressionBombError as error:
        raise SampleFault(f"too many pixels: {re.sub('[^0-9]+', ' ', str(error)).split()[0]}") from error
    except UnidentifiedImageError as error:  # its message would be the address of an object
        raise SampleFault("undecodable image: unreadable header") from error
    except Exception as error:
        raise SampleFault(f"undecodable image: unreadable header ({type(error).__name__}: {error})") from error
    if image.width * image.height > MAX_PIXELS:
        raise SampleFault(f"too many pixels: {image.width}x{image.height}")
    if "progressive" in image.info and data.count(b"\xff\xda") > MAX_SCANS:
        raise SampleFault("undecodable image: a JPEG with too many scans")
    image.info.update(header.info)
    image.decodermaxblock = len(data)  # in one piece: a JPEG decoder that has to wait repeats its row of blocks
    return image


def decode_rgb(image: Image.Image) -> Image.Image:
    """Decode the pixels of an opened image as 8-bit RGB, not yet upright.

    Raises:
        SampleFault: the pixels cannot be decoded.
    """
    try:
        return _to_rgb(image)
    except Exception as error:
        raise SampleFault(f"undecodable image: {type(error).__name__}: {error}") from error


def load_upright(data: bytes) -> Image.Image:
    """Decode the whole image at its own size, upright, as 8-bit RGB.

    Raises:
        SampleFault: the bytes are not a usable image.
    """
    image = open_image(data)
    return turned(decode_rgb(image), orientation(image))


def upright_size(data: bytes) -> tuple[int, int]:
    """Return height and width in pixels of the upright image, from its header.

    Raises:
        SampleFault: the bytes are not a usable image.
    """
    image = open_image(data)
    return (image.width, image.height) if is_sideways(orientation(image)) else (image.height, image.width)


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = profile_of(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return to_srgb(image, profile)
    if image.mode.startswith("I") or image.mode == "F":
        return to_srgb(_from_deep_grey(image), profile).convert("RGB")
    if has_alpha(image):
        return _on_white(image, profile)
    if image.mode in ("L", "CMYK") and transform_of(profile, image.mode) is not None:
        image.load()
        return to_srgb(image, profile)
    colours = image.convert("RGB")
    return colours if image.mode == "CMYK" else to_srgb(colours, profile)


def _on_white(image: Image.Image, profile: bytes) -> Image.Image:
    """Composite a transparent image onto white, some rows at a time."""
    image.load()
    result = Image.new("RGB", image.size)
    for box in _bands(image):
        part = image.crop(box)
        if (see_through := image.info.get("transparency")) is not None:
            part.info["transparency"] = see_through
        layer = layers_to_srgb(part.convert("RGBA"), image.mode, profile)
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, layer).convert("RGB"), box[:2])
    return result


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Convert a gray image of 16 bits, or of floats from 0 to 255, to 8 bits, some rows at a time."""
    image.load()
    result, see_through = Image.new("L", image.size), image.info.get("transparency")
    for box in _bands(image):
        values = np.asarray(image.crop(box), dtype=np.float64)
        grey = np.clip(np.rint(values if image.mode == "F" else values / 257), 0, 255)
        if isinstance(see_through, int):  # one gray level means transparent
            grey[values == see_through] = 255
        result.paste(Image.fromarray(grey.astype(np.uint8)), box[:2])
    return result


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes of whole rows that cover an image, a few million pixels each."""
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield (0, top, image.width, min(top + rows, image.height))


def decode_jpeg(data: bytes, header: ImageFile.ImageFile, scale: int) -> NDArray[np.uint8] | None:
    """Decode the pixels of an intact RGB JPEG at a reduced scale.

    Args:
        data: the file.
        header: the same file as opened by Pillow, not loaded.
        scale: divisor of the sides: 1, 2, 4 or 8.

    Returns:
        uint8 (H,W,3), RGB, with sides ceil(side / scale); None if Pillow has to decode it: another kind of pixels
        (gray, CMYK), or a file about which the decoder complains.
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
"""Time per pixel of Pillow's resize, relative to torch's."""

REACH = 2
"""Support of a shrinking bicubic filter to each side, in pixels of the result."""


def cut(image: NDArray[np.uint8], crop: Crop, seen: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """Resize and cut the crop of an upright RGB image.

    Args:
        image: (H,W,3), the full image at any scale.
        crop: the crop to return.
        seen: height and width of the part of `image`, from its top left corner, that the full image covers: if a JPEG
            is reduced by a scale that does not divide it, its last row and column are only partly covered. None: all.

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
    import torch  # noqa: PLC0415 (takes seconds, and indexing shards or counting captions needs no resize)

    scales = [full / part for full, part in zip((crop.full_height, crop.full_width), seen, strict=True)]
    height, rows = _needed(bottom, crop.full_height, scales[0])
    width, columns = _needed(right, crop.full_width, scales[1])
    pixels = torch.from_numpy(image[:rows, :columns]).permute(2, 0, 1)[None]
    # What `interpolate(..., mode="bicubic", antialias=True)` calls; only this takes both size and scale.
    resized: torch.Tensor = torch.ops.aten._upsample_bicubic2d_aa(pixels, [height, width], False, *scales)
    return resized[0].numpy()


def _needed(end: int, full: int, scale: float) -> tuple[int, int | None]:
    """Return how far to resize one side for its first `end` pixels to be right, and how much of the image that takes.

    A side that is enlarged is resized whole: torch copies a side if its two sizes agree, whatever the scale.
    """
    return (end, ceil((end + REACH) / scale) + 1) if scale < 1 else (full, None)


def _resize_part(image: NDArray[np.uint8], crop: Crop, left: int, seen: tuple[float, float]) -> NDArray[np.uint8]:
    # The filter also sees the pixels around the box, so the result is part of the resize of the whole image.
    scale_y, scale_x = seen[0] / crop.full_height, seen[1] / crop.full_width
    right, bottom = (left + crop.width) * scale_x, (crop.top + crop.height) * scale_y
    box = (left * scale_x, crop.top * scale_y, min(right, image.shape[1]), min(bottom, image.shape[0]))
    return np.asarray(Image.fromarray(image).resize((crop.width, crop.height), Image.Resampling.BICUBIC, box=box))
