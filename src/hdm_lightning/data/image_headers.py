"""Read the format and metadata of an image file before it is opened.

Pillow gets the file without the parts that could cost gigabytes or hours, plus the metadata that it would overlook. It
refuses images with more than a megabyte of texts, which are not needed; in a PNG it reads metadata after the pixels
only once these are decoded, and EXIF stored as text not at all; and it copies the value of every tag, so a small file
can make it copy gigabytes.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from itertools import compress
from typing import NamedTuple

from hdm_lightning.data.faults import SampleFault

HEAD_BYTES = 512
"""Length of the beginning of a file that `image_kind` and `foreign_kind` need."""

READ = "JPEG, PNG, WebP, GIF, BMP, AVIF, TIFF, JPEG 2000 or PPM"
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_STARTS = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    **dict.fromkeys((b"P4\n", b"P5\n", b"P6\n", b"P4 ", b"P5 ", b"P6 "), "PPM"),
}
_FOREIGN = {
    b"\x1f\x8b": "gzip (gunzip < FILE > NEW unpacks it)",
    b"\x28\xb5\x2f\xfd": "Zstandard (zstd -d < FILE > NEW unpacks it)",
    b"BZh": "bzip2 (bunzip2 < FILE > NEW unpacks it)",
    b"\xfd7zXZ\0": "xz (xz -d < FILE > NEW unpacks it)",
    b"PK\x03\x04": "a ZIP archive (unzip unpacks it)",
    b"PK\x05\x06": "an empty ZIP archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"%PDF": "a PDF",
    b"8BPS": "a Photoshop file",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\0\0\x01\0": "an icon (ICO)",
    b"PAR1": "Parquet",
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull fetches the file)",
    b"\0\x05\x16\x07": "macOS metadata of another file (AppleDouble)",
    b"\0\x05\x16\0": "macOS metadata of another file (AppleDouble)",
}
_TEXT = {
    b"<!doctype html": "a page of HTML",
    b"<html": "a page of HTML",
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
}

MAX_PROFILE_BYTES = 4 << 20
MAX_METADATA_BYTES = 1 << 20
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MOVED = (*_TEXTS, b"eXIf", b"iCCP")
_EXIF, _MORE = b"Exif\0\0", b"MPF\0"
_HEX = re.compile(rb"\n\s*\w+\s*\n\s*\d+\s*\n([0-9a-fA-F\s]+)")
MAX_VALUES = 4 << 20
"""Maximum total size of the values in a directory of tags; Pillow is kept from reading larger ones."""
_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
"""Bytes per value of each TIFF type number."""


def image_kind(data: bytes) -> str | None:
    """Return Pillow's name of the format, or None for a format that is not supported here."""
    for start, kind in _STARTS.items():
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return "AVIF" if _brands(data) & _AVIF_BRANDS else None


def format_of(data: bytes) -> str:
    """Return Pillow's name of the format, by the first bytes. Raises SampleFault: the format is not supported."""
    kind = image_kind(data)
    if kind is None:
        known = foreign_kind(data)
        raise SampleFault(f"undecodable image: {f'this is {known}' if known else 'an unknown format'}, not {READ}")
    return kind


def foreign_kind(data: bytes) -> str | None:
    """Describe a file that is not a supported image; None if it is unknown."""
    if not data:
        return "an empty file"
    for start, name in _FOREIGN.items():
        if data.startswith(start):
            return name
    if _brands(data) & _HEIF_BRANDS:
        return "HEIC (convert it to JPEG)"
    text = data[:HEAD_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((name for start, name in _TEXT.items() if text.startswith(start)), None)


def _brands(data: bytes) -> set[bytes]:
    """Return the brands of an ISO base media file: the major one and the compatible ones."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), HEAD_BYTES)
    return {data[8:12]} | {data[start : start + 4] for start in range(16, end - 3, 4)}


class Header(NamedTuple):
    """An image file that is safe to open, and metadata to add to its `info` (with Pillow's names)."""

    data: bytes
    info: dict[str, bytes]


def prepared(data: bytes, kind: str) -> Header:
    """Return a file, in a format by Pillow's name, in a form that is safe to open."""
    if kind == "PNG":
        return _png(data)
    if kind == "JPEG":
        return Header(_jpeg(data), {})
    if kind == "GIF":
        return Header(_gif(data), {})
    return Header(_without_heavy_tags(data) if kind == "AVIF" else data, {})


def _png(data: bytes) -> Header:
    info: dict[str, bytes] = {}
    kept, begin, moved = [], 0, False
    for kind, start, end in _chunks(data):
        if kind in _MOVED:
            moved = True
            kept.append(data[begin:start])
            begin = end
            _note(info, kind, data[start + 8 : end - 4])
    return Header(b"".join([*kept, data[begin:]]) if moved else data, info)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the chunks of a PNG: kind, offset of its start, offset after its checksum."""
    start = 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            return
        yield data[start + 4 : start + 8], start, end
        start = end


def _note(info: dict[str, bytes], kind: bytes, content: bytes) -> None:
    """Put a chunk's EXIF, XMP or profile into `info`; the first one counts, but an eXIf chunk beats EXIF as text."""
    name, _, rest = content.partition(b"\0")
    if kind == b"eXIf":
        info["exif"] = content
    elif kind == b"iCCP":
        info.setdefault("icc_profile", _inflated(rest[1:], MAX_PROFILE_BYTES))
    elif name in (b"Raw profile type exif", b"Raw profile type APP1"):
        text = _inflated(rest[1:], MAX_METADATA_BYTES) if kind == b"zTXt" else rest[:MAX_METADATA_BYTES]
        found = _HEX.match(text)
        raw = bytes.fromhex(found[1].decode("ascii")) if found and not len(b"".join(found[1].split())) % 2 else b""
        if raw.removeprefix(_EXIF)[:2] in (b"II", b"MM"):
            info.setdefault("exif", raw)
    elif kind == b"iTXt" and name == b"XML:com.adobe.xmp":
        packed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
        info.setdefault("xmp", _inflated(text, MAX_METADATA_BYTES) if packed else text[:MAX_METADATA_BYTES])


def _inflated(packed: bytes, limit: int) -> bytes:
    """Return the inflated bytes, empty if they are damaged or longer than the limit."""
    try:
        unpacked = zlib.decompressobj().decompress(packed, limit + 1)
    except zlib.error:
        return b""
    return unpacked if len(unpacked) <= limit else b""


def _jpeg(data: bytes) -> bytes:
    """Return the file with EXIF and multi-picture (MPF) blocks renamed, so Pillow skips them, if costly to read.

    Of several EXIF blocks at most the first one is left, because Pillow joins all of them.
    """
    blocks: dict[bytes, dict[int, bytes]] = {_EXIF: {}, _MORE: {}}
    for marker, start, end in _segments(data):
        name = {0xE1: _EXIF, 0xE2: _MORE}.get(marker)
        if name is not None and data.startswith(name, start):
            blocks[name][start] = data[start + len(name) : end]
    hidden = list(blocks[_MORE]) if any(map(is_heavy, blocks[_MORE].values())) else []
    first = next(iter(blocks[_EXIF]), 0)
    costly = (start > first or is_heavy(block) or _lies_behind(block) for start, block in blocks[_EXIF].items())
    hidden += compress(blocks[_EXIF], costly)
    if not hidden:
        return data
    renamed = bytearray(data)
    for start in hidden:
        renamed[start : start + 4] = renamed[start : start + 4].lower()
    return bytes(renamed)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the segments of a JPEG before its pixels: marker, and start and end of the content (end excluded)."""
    position = 2
    while data[position : position + 1] == b"\xff" and position + 4 <= len(data):
        marker = data[position + 1]
        if marker == 0xDA:
            return
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD8:
            position += 1 if marker == 0xFF else 2
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield marker, position + 4, end
        position = end


def _lies_behind(block: bytes) -> bool:
    """Return whether the first directory begins beyond the block, where another block could be joined to it."""
    return int.from_bytes(block[4:8], "little" if block[:2] == b"II" else "big") > len(block)


def _gif(data: bytes) -> bytes:
    """Return the file without comments before its first image: Pillow joins their parts in quadratic time."""
    position = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    kept, begin = [], 0
    while data[position : position + 1] == b"!":
        end = position + 2
        while end < len(data) and data[end]:
            end += data[end] + 1
        end += 1
        if data[position + 1] != 0xF9:  # 0xF9 is a graphic control, which defines transparency
            kept.append(data[begin:position])
            begin = end
        position = end
    return b"".join([*kept, data[begin:]]) if kept else data


def _without_heavy_tags(data: bytes) -> bytes:
    """Return the file with the start of each heavy set of tags zeroed, wherever it is."""
    for start in (b"II*\0", b"MM\0*"):
        position = data.find(start)
        while position >= 0:
            if is_heavy(data[position : position + MAX_METADATA_BYTES]):
                data = data[:position] + b"\0\0\0\0" + data[position + 4 :]
            position = data.find(start, position + 4)
    return data


def is_heavy(tiff: bytes) -> bool:
    """Return whether the first directory of a TIFF structure claims more bytes of values than any camera writes."""
    return sum(count * (_SIZES[kind] if kind < len(_SIZES) else 8) for _, kind, count, _, _ in tiff_entries(tiff)) > (
        MAX_VALUES
    )


def tiff_entries(tiff: bytes) -> list[tuple[int, int, int, bytes, str]]:
    """Return the first directory: tag, type, number of values, value or its offset as stored, and byte order."""
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
