"""How an image is turned, wherever that is written: EXIF, or the XMP of programs that write no EXIF.

Read here, not by Pillow, whose reader copies the value of every tag: a small file can have it copy gigabytes.
"""

import re
import struct

from PIL import Image

MAX_VALUES = 4 << 20
"""Bytes that all values of a directory of tags may have together, before Pillow is kept from reading it."""

_ORIENTATION = 0x0112
_INTEGERS = {1: "B", 3: "H", 4: "I"}
_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
"""Bytes of one value, by its type in TIFF's numbers."""

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
    """EXIF's number of how an opened image is turned, 1 (upright) where it is not said."""
    if image.format == "TIFF":  # Pillow turns these by itself
        return 1
    exif, xmp = image.info.get("exif"), image.info.get("xmp")
    turn = exif_orientation(exif) if isinstance(exif, bytes) else None
    if turn is None and isinstance(xmp, bytes) and (found := _XMP.search(xmp)):
        turn = int(found[1])
    return turn or 1


def is_sideways(turn: int) -> bool:
    """Whether an EXIF orientation changes height and width."""
    return turn in _SIDEWAYS


def turned(image: Image.Image, turn: int) -> Image.Image:
    """An image put upright, by its EXIF orientation."""
    return image.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else image


def exif_orientation(exif: bytes) -> int | None:
    """The orientation of an EXIF block, or None where it has none or is damaged."""
    for tag, kind, count, value, order in _entries(exif.removeprefix(b"Exif\0\0")):
        if tag == _ORIENTATION:
            form = _INTEGERS.get(kind)
            return int(struct.unpack_from(order + form, value)[0]) if form and count else None
    return None


def is_heavy(tiff: bytes) -> bool:
    """Whether the first directory of a TIFF structure promises more bytes of values than any camera's has."""
    return sum(count * (_SIZES[kind] if kind < len(_SIZES) else 8) for _, kind, count, _, _ in _entries(tiff)) > (
        MAX_VALUES
    )


def _entries(tiff: bytes) -> list[tuple[int, int, int, bytes, str]]:
    """The first directory: tag, type, number of values, the field of the value or of its place, and byte order."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return []
    big = struct.unpack_from(order + "H", tiff, 2)[0] == 43
    head, entry = ("Q", "HHQ8s") if big else ("I", "HHI4s")
    try:
        at = struct.unpack_from(order + head, tiff, 8 if big else 4)[0]
        count = struct.unpack_from(order + ("Q" if big else "H"), tiff, at)[0]
    except (struct.error, OverflowError):
        return []
    at, step = at + (8 if big else 2), struct.calcsize(order + entry)
    there = min(count, (len(tiff) - at) // step, 1 << 16)
    return [(*struct.unpack_from(order + entry, tiff, at + number * step), order) for number in range(there)]
