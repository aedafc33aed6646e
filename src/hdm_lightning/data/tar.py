"""Reading tar members from any range of bytes: ustar, GNU long names and PAX paths.

A sample of a shard is a run of members whose names share what stands before the first dot of the base name, as
webdataset groups them. This reader checks each header and never looks outside the range that it was given.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hdm_lightning.data.faults import SampleFault

BLOCK = 512
_ZEROS = bytes(BLOCK)
_KEY = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
_REGULAR = (b"0", b"\0", b"7")

ReadAt = Callable[[int, int], bytes]


class Member(NamedTuple):
    """A regular file of an archive.

    `start` is where its first header block stands (extended headers included), `data` where its bytes begin,
    `end` where the next header stands, all in bytes.
    """

    name: str
    start: int
    data: int
    size: int
    end: int


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member's name, or None for a name that belongs to no sample."""
    match = _KEY.match(name)
    return (match[1], match[2].lower()) if match else None


def is_unsafe(name: str) -> bool:
    """Whether a member's name is absolute or climbs out of its folder."""
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":"


def members(read: ReadAt, start: int, end: int, *, whole: bool = False) -> Iterator[Member]:
    """The regular files between two byte offsets, in order; stops at the end mark of the archive.

    Args:
        read: `read(offset, size)` gives the bytes there, fewer at the end of the file.
        start: offset of a header.
        end: where to stop.
        whole: the range reaches to the end of the archive, so that an end mark must come.

    Raises:
        SampleFault: a header is damaged, or the bytes end inside a member.
    """
    position, first, long_name = start, start, None
    while position < end:
        header = read(position, BLOCK)
        if len(header) < BLOCK:
            raise SampleFault("truncated: the archive ends inside a header")
        if header == _ZEROS:
            return
        name, size, kind = _parse(header)
        data = position + BLOCK
        position = data + -(-size // BLOCK) * BLOCK
        if position > end:
            raise SampleFault("truncated: the archive ends inside a member")
        if kind == b"L":
            long_name = read(data, size).rstrip(b"\0").decode("utf-8", "backslashreplace")
        elif kind == b"x":
            long_name = _pax_path(read(data, size)) or long_name
        elif kind != b"g":
            if kind in _REGULAR:
                yield Member(long_name or name, first, data, size, position)
            first, long_name = position, None
    if whole:
        raise SampleFault("truncated: the archive has no end mark")


def _parse(header: bytes) -> tuple[str, int, bytes]:
    recorded = _number(header[148:156])
    if recorded != sum(header[:148]) + 256 + sum(header[156:]):
        raise SampleFault("damaged tar header: its checksum is wrong")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "backslashreplace"), _number(header[124:136]), header[156:157]


def _number(field: bytes) -> int:
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    else:
        try:
            value = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
        except ValueError:
            raise SampleFault("damaged tar header: a number cannot be read") from None
    if value < 0:
        raise SampleFault("damaged tar header: a negative number")
    return value


def _pax_path(records: bytes) -> str | None:
    """The `path` of a PAX header made of records `length key=value\\n`."""
    path, position = None, 0
    while position < len(records):
        length, _, _ = records[position:].partition(b" ")
        if not length.isdigit() or int(length) == 0:
            raise SampleFault("damaged tar header: a PAX record cannot be read")
        record = records[position + len(length) + 1 : position + int(length) - 1]
        if record.startswith(b"path="):
            path = record[5:].decode("utf-8", "backslashreplace")
        position += int(length)
    return path
