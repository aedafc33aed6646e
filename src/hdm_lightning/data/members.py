"""The members of a sample: how they lie in its range of the shard, and cutting them out of its bytes.

The index notes for each sample which layout it has and how long its members are, as packed columns over the samples
of a shard, so that loading parses no header.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.tar import BLOCK, Member, ReadAt, members, split_name

IMAGE_EXTENSIONS = ("jpg", "webp", "png", "jpeg", "gif", "bmp", "avif")
CHECKED_BYTES = 4096
"""Beginning of each member that goes into a sample's check."""


class RawSample(NamedTuple):
    """A sample as it lies in its shard: key, and bytes by lower-case extension."""

    key: str
    members: dict[str, bytes]

    def image(self) -> bytes:
        """The bytes of the image.

        Raises:
            SampleFault: there is none, or it is empty.
        """
        for extension in IMAGE_EXTENSIONS:
            data = self.members.get(extension)
            if data is not None:
                if not data:
                    raise SampleFault("empty image")
                return data
        raise SampleFault("no image")


class Layout(NamedTuple):
    """How the members of a sample lie in its range; the samples of a shard share few layouts.

    `key_at` is the offset in bytes at which the sample's key is written, -1 where it is not written in one piece: such
    a sample is parsed. `members` are (extension, blocks of 512 bytes from the end of the member before, padding
    included, to the first byte of this one); `tail` the blocks after the last one.
    """

    key_at: int
    members: tuple[tuple[str, int], ...]
    tail: int


PARSED = Layout(-1, (("", 0),), 0)
"""The layout of a sample whose headers have to be parsed: its range counts as one member."""


class Form(NamedTuple):
    """All that is needed to cut one sample: layout, length of the key, sizes of the members, check."""

    layout: Layout
    key_length: int
    sizes: tuple[int, ...]
    check: int

    def cut(self, data: bytes) -> RawSample:
        """The sample in the bytes of its range.

        Raises:
            SampleFault: they are not the bytes that were indexed, or cannot be parsed.
        """
        key, found, check = b"", {}, 0
        if self.layout.key_at < 0:
            check = zlib.crc32(data[:CHECKED_BYTES])
        else:
            key = data[self.layout.key_at : self.layout.key_at + self.key_length]
            check, position = zlib.crc32(key), 0
            for (extension, gap), size in zip(self.layout.members, self.sizes, strict=False):
                begin = position + gap * BLOCK
                member = found[extension] = data[begin : begin + size]
                check = zlib.crc32(member[:CHECKED_BYTES], check)
                position = begin + padded(size)
        if check & 0xFFFF != self.check:
            raise SampleFault("the shard does not match its index: other bytes than were indexed")
        return parse_sample(data) if self.layout.key_at < 0 else RawSample(_text(key), found)


@dataclass(frozen=True)
class Forms:
    """The forms of the n samples of a shard: (n,), (n,), (n, members), (n,), all int64."""

    layouts: Sequence[Layout]
    layout: NDArray[np.int64]
    key_length: NDArray[np.int64]
    sizes: NDArray[np.int64]
    check: NDArray[np.int64]

    def each(self) -> list[Form]:
        """The form of every sample."""
        layouts = [self.layouts[number] for number in self.layout.tolist()]
        sizes = map(tuple, self.sizes.tolist())
        return list(map(Form, layouts, self.key_length.tolist(), sizes, self.check.tolist()))

    def take(self, rows: NDArray[np.generic]) -> "Forms":
        """Those of some rows (or of a mask)."""
        return Forms(self.layouts, self.layout[rows], self.key_length[rows], self.sizes[rows], self.check[rows])

    def range_bytes(self) -> NDArray[np.int64]:
        """Bytes from the beginning of each sample to that of the next, int64 (n,)."""
        gaps = np.array([sum(gap for _, gap in each.members) + each.tail for each in self.layouts], dtype=np.int64)
        return gaps[self.layout] * BLOCK + (-(-self.sizes // BLOCK) * BLOCK).sum(axis=1)


class SampleTable(NamedTuple):
    """Samples of one shard, in the order of the archive; int64 (n,) each.

    `start` and `size` are bytes, `height` and `width` pixels of the upright image (0 where unknown). `forms` is None
    where an index of the first format says nothing of members.
    """

    ordinal: NDArray[np.int64]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    forms: Forms | None

    def take(self, rows: NDArray[np.generic]) -> "SampleTable":
        """Those of some rows (or of a mask)."""
        forms = None if self.forms is None else self.forms.take(rows)
        ordinal, start, size, height, width = (column[rows] for column in self[:5])
        return SampleTable(ordinal, start, size, height, width, forms)


@dataclass(frozen=True)
class Columns:
    """What an index says of each sample of a shard, used or not, as `pack` wrote it.

    Attributes:
        height, width: pixels of the upright image, 0 where unknown.
        layouts, layout: the layouts in use, and the number of each sample's.
        key_length: bytes of the key.
        sizes: bytes of the first members of all samples, of the second ones of those that have two, and so on.
        check: lower 16 bits of a CRC-32 of the key and the beginning of each member.
        blocks: in the first format, 512-byte blocks from one sample to the next, in place of layouts and sizes.
    """

    height: bytes
    width: bytes
    layouts: tuple[Layout, ...] = ()
    layout: bytes = b""
    key_length: bytes = b""
    sizes: tuple[bytes, ...] = ()
    check: bytes = b""
    blocks: bytes | None = None

    @classmethod
    def of(cls, forms: Sequence[Form], shapes: Sequence[tuple[int, int]]) -> "Columns":
        """The columns of samples with these forms and (height, width)."""
        layouts = tuple(dict.fromkeys(form.layout for form in forms))
        number = {layout: place for place, layout in enumerate(layouts)}
        most = max((len(form.sizes) for form in forms), default=0)
        return cls(
            height=pack([height for height, _ in shapes]),
            width=pack([width for _, width in shapes]),
            layouts=layouts,
            layout=pack([number[form.layout] for form in forms]),
            key_length=pack([form.key_length for form in forms]),
            sizes=tuple(pack([form.sizes[turn] for form in forms if turn < len(form.sizes)]) for turn in range(most)),
            check=pack([form.check for form in forms]),
        )

    def shapes(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Height and width of all samples."""
        read = unpack if self.blocks is None else unpack_rows
        return read(self.height, count), read(self.width, count)

    def forms(self, count: int) -> Forms:
        """The forms of all samples."""
        layout = unpack(self.layout, count)
        members = np.array([len(each.members) for each in self.layouts], dtype=np.int64)
        if count and (layout.max() >= len(members) or members.max() > len(self.sizes)):
            raise ValueError("a layout is missing")
        own = members[layout]
        sizes = np.zeros((count, len(self.sizes)), dtype=np.int64)
        for turn, column in enumerate(self.sizes):
            has = own > turn
            sizes[has, turn] = unpack(column, int(has.sum()))
        return Forms(self.layouts, layout, unpack(self.key_length, count), sizes, unpack(self.check, count))


def pack(column: Sequence[int] | NDArray[np.int64]) -> bytes:
    """A column of numbers in [0, 2^62): all lowest bytes, then all second ones, and so on, deflated."""
    numbers = np.asarray(column, dtype="<u8")
    width = 4 if not len(numbers) or numbers.max() < 1 << 32 else 8
    planes = numbers.astype(f"<u{width}").view(np.uint8).reshape(-1, width).T
    return zlib.compress(planes.tobytes(), 6)


def unpack(packed: bytes, count: int) -> NDArray[np.int64]:
    """The column of `count` numbers that `pack` wrote, as int64.

    Raises:
        ValueError: it is none.
    """
    raw = _inflated(packed, 8 * count)
    width = 8 if len(raw) > 4 * count else 4
    if len(raw) != width * count:
        raise ValueError("a column has not as many entries as there are samples")
    numbers = np.ascontiguousarray(raw.reshape(width, count).T).view(f"<u{width}")[:, 0]
    if width == 8 and numbers.max() >> 62:
        raise ValueError("a column holds a number beyond all sizes")
    return numbers.astype(np.int64)


def unpack_rows(packed: bytes, count: int) -> NDArray[np.int64]:
    """The same of an index of the first format, which wrote number by number, in 4 bytes each."""
    raw = _inflated(packed, 4 * count)
    if len(raw) != 4 * count:
        raise ValueError("a column has not as many entries as there are samples")
    return raw.view("<u4").astype(np.int64)


def _inflated(packed: bytes, limit: int) -> NDArray[np.uint8]:
    # With a limit, as a small file can unpack to gigabytes.
    try:
        return np.frombuffer(zlib.decompressobj().decompress(packed, limit + 1), dtype=np.uint8)
    except zlib.error as error:
        raise ValueError(f"a column cannot be unpacked ({error})") from error


def padded(size: int) -> int:
    """Bytes that a member of this size takes, its padding included."""
    return -(-size // BLOCK) * BLOCK


def form_of(read: ReadAt, key: str, start: int, end: int, found: Mapping[str, Member]) -> Form:
    """The form of a sample between two offsets of an archive, from its members as `walk` gave them."""
    length, in_order = len(key.encode("utf-8", "replace")), list(found.items())
    name_at = in_order[0][1].name_at
    if name_at < 0 or _text(read(name_at, length)) != key:
        return Form(PARSED, 0, (end - start,), zlib.crc32(read(start, min(end - start, CHECKED_BYTES))) & 0xFFFF)
    check, position, placed = zlib.crc32(read(name_at, length)), start, []
    for extension, member in in_order:
        placed.append((extension, (member.data - position) // BLOCK))
        check = zlib.crc32(read(member.data, min(member.size, CHECKED_BYTES)), check)
        position = member.end
    layout = Layout(name_at - start, tuple(placed), (end - position) // BLOCK)
    return Form(layout, length, tuple(member.size for member in found.values()), check & 0xFFFF)


def parse_sample(data: bytes) -> RawSample:
    """The sample that a range of a shard holds, by its headers.

    Raises:
        SampleFault: the range is cut, or holds something else than the members of one key.
    """
    found: dict[str, bytes] = {}
    sample_key = ""
    for member in members(lambda start, size: data[start : start + size], 0, len(data)):
        named = split_name(member.name)
        if named is None:
            continue
        key, extension = named
        if sample_key and key != sample_key:
            raise SampleFault("the shard does not match its index: two keys where one was")
        sample_key = key
        found[extension] = data[member.data : member.data + member.size]
    if not sample_key:
        raise SampleFault("the shard does not match its index: no sample here")
    return RawSample(sample_key, found)


def _text(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")
