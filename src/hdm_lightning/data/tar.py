"""Find the members of a tar archive (ustar, GNU long names, PAX paths) by walking its headers, even damaged ones."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hdm_lightning.data.faults import SampleFault

BLOCK = 512
MAX_EXTENDED_BYTES = 1 << 20
"""Maximum size of a long name or set of PAX records that is read."""

CHUNK_BYTES = 1 << 20
_ZEROS = bytes(BLOCK)
_KEY = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
_REGULAR = (b"0", b"\0", b"7")

_PASSED = {
    b"1": "links, which have no bytes of their own",
    b"2": "links, which have no bytes of their own",
    **dict.fromkeys((b"3", b"4", b"6"), "devices and pipes"),
}
"""Skipped members by header type; folders (5) and global headers (g) are not worth reporting."""

Passed = Callable[[str], None]
"""Called with the kind of each skipped member."""

ReadAt = Callable[[int, int], bytes]
"""`read(offset, size)` returns the bytes there, fewer at the end of the file."""


class Member(NamedTuple):
    """A regular file in an archive; all offsets are in bytes.

    `start` is the offset of its first header block (extended headers included), `data` that of its contents, `end` that
    of the next header, and `name_at` that of its name if it is stored in one piece, else -1.
    """

    name: str
    start: int
    data: int
    size: int
    end: int
    name_at: int


class Gap(NamedTuple):
    """Bytes of an archive, [start, end), in which no member can be read.

    `torn` is whether the samples next to it may lack members; not so for an end mark in the middle of a file.
    """

    start: int
    end: int
    reason: str
    torn: bool = True


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and lower-case extension of a member's name, or None for a name that belongs to no sample."""
    match = _KEY.match(name)
    return (match[1], match[2].lower()) if match else None


def is_unsafe(name: str) -> bool:
    """Return whether a member's name is absolute or leads out of its folder."""
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":"


def members(read: ReadAt, start: int, end: int) -> Iterator[Member]:
    """Yield the regular files between two byte offsets, in order, up to an end mark.

    Raises:
        SampleFault: a header is damaged, or the bytes end inside a member.
    """
    while start < end and isinstance(member := _next_member(read, start, end), Member):
        yield member
        start = member.end


def walk(read: ReadAt, size: int, passed: Passed | None = None) -> Iterator[Member | Gap]:
    """Yield the regular files of an archive of `size` bytes, and the gaps between them where it is damaged.

    After damage, or an end mark in the middle of the file, reading resumes at the next intact header. `passed` is
    called for links and devices.
    """
    position = 0
    while position < size:
        try:
            found = _next_member(read, position, size, passed)
        except SampleFault as fault:
            gap = Gap(position, _next_header(read, position + BLOCK, size), str(fault))
        else:
            if isinstance(found, Member):
                yield found
                position = found.end
                continue
            if found == size:
                break
            gap = _behind_end_mark(read, found, size)
            if gap.start == size:
                return
        yield gap
        position = gap.end
        if position == size:
            return
    yield Gap(size, size, "truncated: the archive has no end mark")


def _next_member(read: ReadAt, start: int, end: int, passed: Passed | None = None) -> Member | int:
    """Return the next regular file, or the offset of the end mark or end of the range that comes before one."""
    position, first, long_name = start, start, None
    while position < end:
        header = read(position, BLOCK)
        if len(header) < BLOCK:
            raise SampleFault("truncated: the archive ends inside a header")
        if header == _ZEROS:
            return position
        name, size, kind = _parse(header)
        data = position + BLOCK
        following = data + -(-size // BLOCK) * BLOCK  # with its padding
        if following > end:
            raise SampleFault("truncated: the archive ends inside a member")
        if kind in (b"L", b"x"):
            if size > MAX_EXTENDED_BYTES:
                raise SampleFault(f"damaged tar header: an extended header of {size} bytes")
            content = read(data, size)
            long_name = ((content.rstrip(b"\0"), data) if kind == b"L" else _pax_path(content, data)) or long_name
        elif kind != b"g":
            if kind in _REGULAR:
                named, name_at = long_name or (name, -1 if header[345] else position)
                return Member(decoded_name(named), first, data, size, following, name_at)
            if passed is not None and kind in _PASSED:
                passed(_PASSED[kind])
            first, long_name = following, None
        position = following
    return position


def _parse(header: bytes) -> tuple[bytes, int, bytes]:
    if not _is_header(header):
        raise SampleFault("damaged tar header: its checksum is wrong")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name, _number(header[124:136]), header[156:157]


def _is_header(block: bytes) -> bool:
    """Return whether a block has the checksum of a tar header."""
    if len(block) < BLOCK or block == _ZEROS:
        return False
    try:
        return _number(block[148:156]) == sum(block[:148]) + 256 + sum(block[156:])
    except SampleFault:
        return False


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


def decoded_name(name: bytes) -> str:
    """Return a member's name as text, with escapes for bytes that are not UTF-8."""
    return name.decode("utf-8", "backslashreplace")


def _pax_path(records: bytes, at: int) -> tuple[bytes, int] | None:
    """Return the `path` of a PAX header (records `length key=value\\n`) and its offset, or None."""
    path, position = None, 0
    while position < len(records):
        space = records.find(b" ", position, position + 21)
        length = records[position:space]
        end = position + int(length) if space > 0 and length.isdigit() else 0
        if end <= space + 1:
            raise SampleFault("damaged tar header: a PAX record cannot be read")
        if records.startswith(b"path=", space + 1):
            path = records[space + 6 : end - 1], at + space + 6
        position = end
    return path


def _next_header(read: ReadAt, start: int, size: int) -> int:
    """Return the offset of the next intact header, at a multiple of a block; `size` if there is none."""
    for begin in range(start, size, CHUNK_BYTES):
        chunk = read(begin, CHUNK_BYTES)
        for offset in range(0, len(chunk), BLOCK):
            # A cheap test before the checksum: octal digits in this field are rare in compressed data.
            if chunk[offset + 148 : offset + 154].strip(b" \0").isdigit() and _is_header(
                chunk[offset : offset + BLOCK]
            ):
                return begin + offset
    return size


def _behind_end_mark(read: ReadAt, mark: int, size: int) -> Gap:
    """Return the gap between an end mark and the next member; it starts at `size` if only zeros follow, as it should.

    A zeroed-out header also looks like an end mark: then the samples next to it may lack members.
    """
    following = _first_not_zero(read, mark, size)
    if following == size:
        return Gap(size, size, "")
    header = following if _is_header(read(following, BLOCK)) else _next_header(read, following + BLOCK, size)
    torn = header > following and (header < size or following - mark < 2 * BLOCK)
    return Gap(mark, header, "there is an end mark before the end of the archive", torn)


def _first_not_zero(read: ReadAt, start: int, size: int) -> int:
    """Return the offset of the first block from `start` that is not all zeros; `size` if all of them are."""
    for begin in range(start, size, CHUNK_BYTES):
        chunk = read(begin, CHUNK_BYTES)
        rest = len(chunk.lstrip(b"\0"))
        if rest:
            return begin + (len(chunk) - rest) // BLOCK * BLOCK
    return size
