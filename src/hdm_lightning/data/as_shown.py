"""An image as a viewer shows it: turned upright by its metadata (EXIF, or XMP from programs that write no EXIF), and
with its colors converted to sRGB by its profile.

Shapes: H×W pixels.
"""

import io
import re
import struct
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from hdm_lightning.data.image_headers import MAX_PROFILE_BYTES, tiff_entries

MOST_ALIKE = 1
"""Largest difference in levels of a profile that counts as sRGB: its many encodings round differently."""

_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
Transform = Any

_ORIENTATION = 0x0112
_INTEGERS = {1: "B", 3: "H", 4: "I"}
_XMP = re.compile(rb"""tiff:Orientation\s{0,9}(?:=\s{0,9}["']|>)\s{0,9}([1-8])""")
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


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 (upright) if there is none."""
    if image.format == "TIFF":  # Pillow turns these upright by itself
        return 1
    exif, xmp = image.info.get("exif"), image.info.get("xmp")
    turn = exif_orientation(exif) if isinstance(exif, bytes) else None
    if turn is None and isinstance(xmp, bytes) and (found := _XMP.search(xmp)):
        turn = int(found[1])
    return turn or 1


def is_sideways(turn: int) -> bool:
    """Return whether an EXIF orientation swaps height and width."""
    return turn in _SIDEWAYS


def turned(image: Image.Image, turn: int) -> Image.Image:
    """Turn an image upright by its EXIF orientation."""
    return image.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else image


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation in an EXIF block, or None if it has none or is damaged."""
    for tag, kind, count, value, order in tiff_entries(exif.removeprefix(b"Exif\0\0")):
        if tag == _ORIENTATION:
            form = _INTEGERS.get(kind)
            return int(struct.unpack_from(order + form, value)[0]) if form and count else None
    return None


def profile_of(image: Image.Image) -> bytes:
    """Return the embedded color profile, empty if there is none or it is too large."""
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) and len(profile) <= MAX_PROFILE_BYTES else b""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an RGB, L or CMYK image to sRGB; unchanged if the profile is sRGB, for another mode, or damaged."""
    transform = transform_of(profile, image.mode)
    if transform is None:
        return image
    result = ImageCms.applyTransform(image, transform)
    return image if result is None else result


def has_alpha(image: Image.Image) -> bool:
    """Return whether pixels of an image may be transparent."""
    return image.mode in _WITH_ALPHA or "transparency" in image.info


def layers_to_srgb(layers: Image.Image, mode: str, profile: bytes) -> Image.Image:
    """Convert an RGBA image, made from one of another mode, to sRGB by the profile of that one; alpha stays."""
    if not profile:
        return layers
    grey = mode in ("L", "LA", "La") and transform_of(profile, "L") is not None
    colours = to_srgb(layers.getchannel("R") if grey else layers.convert("RGB"), profile)
    colours.putalpha(layers.getchannel("A"))
    return colours


def pixels_to_srgb(pixels: NDArray[np.uint8], profile: bytes) -> NDArray[np.uint8]:
    """Convert pixels, uint8 (H,W,3), to sRGB as `to_srgb` does."""
    if transform_of(profile, "RGB") is None:
        return pixels
    return np.asarray(to_srgb(Image.fromarray(pixels), profile))


@lru_cache(maxsize=16)
def transform_of(profile: bytes, mode: str) -> Transform | None:
    """Return the transform of pixels of a mode to sRGB, None if they need no change."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if not profile or _SPACES.get(source.profile.xcolor_space) != mode:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        return None if _changes_nothing(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None  # use the values as they are


def _changes_nothing(transform: Transform, mode: str) -> bool:
    """Return whether a transform leaves a grid of colors unchanged up to rounding."""
    if mode == "CMYK":
        return False
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 18, 3)
    probe = Image.fromarray(grid) if mode == "RGB" else Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    after = np.asarray(ImageCms.applyTransform(probe, transform), dtype=np.int16)
    before = np.asarray(probe.convert("RGB"), dtype=np.int16)
    return bool(np.abs(after - before).max() <= MOST_ALIKE)
