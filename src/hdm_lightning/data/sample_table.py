"""Where the samples of a shard lie, and cutting them out of it without parsing its headers.

A sample is a run of members whose names share what stands before the first dot of the base name, as webdataset groups
them. Indexing notes for each sample how its members lie, so that loading cuts them out of one known range.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.index_columns import Integers
from hdm_lightning.data.tar import BLOCK, Member, ReadAt, decoded_name, members, split_name

IMAGE_EXTENSIONS = (
    "jpg",
    "webp",
    "png",
    "jpeg",
    "gif",
    "bmp",
    "avif",
    "jfif",
    "jpe",
    "apng",
    "tif",
    "tiff",
    "jp2",
    "ppm",
)
TEXT_EXTENSIONS = ("txt", "json")
LATENT = "latent.safetensors"
"""Extension of the member that stands in the place of an image, see `data.latents`."""

CHECKED_BYTES = 4096
"""Beginning of each member that goes into a sample's check."""

MOST_MEMBERS = 64
"""Members of a sample that is cut without its headers; columns of an index have a place for each."""


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
                position = begin + -(-size // BLOCK) * BLOCK  # with its padding
        if check & 0xFFFF != self.check:
            raise SampleFault("the shard does not match its index: other bytes than were indexed")
        return (
            parse_sample(data) if self.layout.key_at < 0 else RawSample(key.decode("utf-8", "backslashreplace"), found)
        )


def form_of(read: ReadAt, key: str, start: int, end: int, found: Mapping[str, Member]) -> Form:
    """The form of a sample between two offsets of an archive, from its members as `walk` gave them."""
    length, in_order = len(key.encode("utf-8", "replace")), list(found.items())
    name_at = in_order[0][1].name_at
    if name_at < 0 or len(found) > MOST_MEMBERS or decoded_name(read(name_at, length)) != key:
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


class SampleTable(NamedTuple):
    """Samples of one shard, in the order of the archive: int64 (n,) each, `sizes` (n, members); all sizes in bytes."""

    ordinal: Integers
    start: Integers
    size: Integers
    layout: Integers
    key_length: Integers
    sizes: Integers
    check: Integers
    layouts: Sequence[Layout]

    def take(self, rows: NDArray[np.generic] | slice) -> "SampleTable":
        """Those of some rows (or of a mask or slice)."""
        chosen: dict[str, Any] = {name: getattr(self, name)[rows] for name in self._fields if name != "layouts"}
        return self._replace(**chosen)

    def forms(self) -> list[Form]:
        """How each sample is cut."""
        layouts = [self.layouts[number] for number in self.layout.tolist()]
        sizes = map(tuple, self.sizes.tolist())
        return list(map(Form, layouts, self.key_length.tolist(), sizes, self.check.tolist()))
