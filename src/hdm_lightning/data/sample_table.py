"""Locations of the samples in a shard, and cutting them out without parsing tar headers.

A sample is a run of members whose names are equal up to the first dot of the base name, as in webdataset. Indexing
records how each sample's members are laid out, so that loading cuts them out of one known range.
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
"""Extension of the member that replaces an image, see `data.latent_sets`."""

CHECKED_BYTES = 4096
"""Length of the beginning of each member that goes into a sample's check."""

MOST_MEMBERS = 64
"""Maximum number of members of a sample that is cut without parsing headers; the index has a column for each."""


class RawSample(NamedTuple):
    """A sample as stored in its shard: its key, and the bytes of its members by lower-case extension."""

    key: str
    members: dict[str, bytes]

    def image(self) -> bytes:
        """Return the bytes of the image. Raises SampleFault: there is none, or it is empty."""
        for extension in IMAGE_EXTENSIONS:
            data = self.members.get(extension)
            if data is not None:
                if not data:
                    raise SampleFault("empty image")
                return data
        raise SampleFault("no image")


class Layout(NamedTuple):
    """How the members of a sample are laid out in its range; the samples of a shard share few layouts.

    `key_at` is the offset of the sample's key in bytes, or -1 if the key is not stored in one piece and the sample has
    to be parsed. `members` are (extension, 512-byte blocks from the end of the previous member, padding included, to
    the first byte of this one); `tail` is the number of blocks after the last one.
    """

    key_at: int
    members: tuple[tuple[str, int], ...]
    tail: int


PARSED = Layout(-1, (("", 0),), 0)
"""Layout of a sample whose headers have to be parsed: its range counts as one member."""


class Form(NamedTuple):
    """Everything needed to cut one sample: layout, length of the key, sizes of the members, check."""

    layout: Layout
    key_length: int
    sizes: tuple[int, ...]
    check: int

    def cut(self, data: bytes) -> RawSample:
        """Cut the sample out of the bytes of its range.

        Raises:
            SampleFault: the bytes are not those that were indexed, or cannot be parsed.
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
        if self.layout.key_at < 0:
            return parse_sample(data)
        return RawSample(key.decode("utf-8", "backslashreplace"), found)


def form_of(read: ReadAt, key: str, start: int, end: int, found: Mapping[str, Member]) -> Form:
    """Return the form of a sample between two offsets of an archive, from its members as `walk` yields them."""
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
    """Parse the sample in a range of a shard by its headers.

    Raises:
        SampleFault: the range is cut off, or does not contain the members of exactly one key.
    """
    found: dict[str, bytes] = {}
    sample_key = ""
    for member in members(lambda start, size: data[start : start + size], 0, len(data)):
        named = split_name(member.name)
        if named is None:
            continue
        key, extension = named
        if sample_key and key != sample_key:
            raise SampleFault("the shard does not match its index: found two keys instead of one")
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
        """Return the samples of some rows, or of a mask or slice."""
        chosen: dict[str, Any] = {name: getattr(self, name)[rows] for name in self._fields if name != "layouts"}
        return self._replace(**chosen)

    def forms(self) -> list[Form]:
        """Return the form of each sample."""
        layouts = [self.layouts[number] for number in self.layout.tolist()]
        sizes = map(tuple, self.sizes.tolist())
        return list(map(Form, layouts, self.key_length.tolist(), sizes, self.check.tolist()))
