"""The bytes of an image as Pillow may open them: without what could cost gigabytes or hours, with what it overlooks.

Texts are not needed, and Pillow refuses images with more than a megabyte of them. Of a PNG it reads what stands
behind the pixels only after decoding them, and EXIF written as a text not at all.
"""

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from hdm_lightning.data.orientation import is_heavy

MAX_PROFILE_BYTES = 4 << 20
MAX_METADATA_BYTES = 1 << 20
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MOVED = (*_TEXTS, b"eXIf", b"iCCP")
_EXIF, _MORE = b"Exif\0\0", b"MPF\0"
_HEX = re.compile(rb"\n\s*\w+\s*\n\s*\d+\s*\n([0-9a-fA-F\s]+)")


class Header(NamedTuple):
    """An image file as it may be opened, and what of its metadata has to be put beside it (names as Pillow's)."""

    data: bytes
    info: dict[str, bytes]


def prepared(data: bytes, kind: str) -> Header:
    """The file of a format by Pillow's name as it may be opened."""
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
    """The chunks of a PNG: kind, first byte of its length, first byte behind its checksum."""
    start = 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            return
        yield data[start + 4 : start + 8], start, end
        start = end


def _note(info: dict[str, bytes], kind: bytes, content: bytes) -> None:
    """Put a chunk's EXIF, XMP or profile into `info`; the first of each counts, and a proper one before a text."""
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
    """What is packed, empty where it is damaged or longer than the limit."""
    try:
        unpacked = zlib.decompressobj().decompress(packed, limit + 1)
    except zlib.error:
        return b""
    return unpacked if len(unpacked) <= limit else b""


def _jpeg(data: bytes) -> bytes:
    """The file with its EXIF, and the list of a phone's further images, hidden where they would cost much to read."""
    blocks: dict[bytes, list[bytes]] = {_EXIF: [], _MORE: []}
    for marker, start, end in _segments(data):
        name = {0xE1: _EXIF, 0xE2: _MORE}.get(marker)
        if name is not None and data.startswith(name, start):
            blocks[name].append(data[start + len(name) : end])
    if any(is_heavy(block) for block in blocks[_MORE]):
        data = data.replace(_MORE, _MORE.lower())
    heavy = len(blocks[_EXIF]) > 1 or any(is_heavy(block) or _lies_behind(block) for block in blocks[_EXIF])
    return _with_first_exif(data, blocks[_EXIF]) if heavy else data


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The segments of a JPEG before its pixels: marker, first and last byte of the content (end excluded)."""
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
    """Whether the first directory begins beyond the block, where another one could be put."""
    return int.from_bytes(block[4:8], "little" if block[:2] == b"II" else "big") > len(block)


def _with_first_exif(data: bytes, blocks: list[bytes]) -> bytes:
    """The JPEG with at most the first of its EXIF blocks: Pillow joins them all."""
    hidden = data.replace(_EXIF, b"exif\0\0")
    if is_heavy(blocks[0]) or _lies_behind(blocks[0]):
        return hidden
    return hidden.replace(b"exif\0\0", _EXIF, 1)


def _gif(data: bytes) -> bytes:
    """The file without comments before its first image: Pillow joins their parts in quadratic time."""
    position = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    kept, begin = [], 0
    while data[position : position + 1] == b"!":
        end = position + 2
        while end < len(data) and data[end]:
            end += data[end] + 1
        end += 1
        if data[position + 1] != 0xF9:  # a graphic control, which tells what is transparent
            kept.append(data[begin:position])
            begin = end
        position = end
    return b"".join([*kept, data[begin:]]) if kept else data


def _without_heavy_tags(data: bytes) -> bytes:
    """The file with the beginning of each heavy set of tags wiped, wherever it lies."""
    for start in (b"II*\0", b"MM\0*"):
        position = data.find(start)
        while position >= 0:
            if is_heavy(data[position : position + MAX_METADATA_BYTES]):
                data = data[:position] + b"\0\0\0\0" + data[position + 4 :]
            position = data.find(start, position + 4)
    return data
