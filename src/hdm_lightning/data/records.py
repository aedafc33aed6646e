"""What an index says about shards: where each usable sample begins, and what was left out."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class SampleTable(NamedTuple):
    """The usable samples of one shard, in the order of the archive; int64 (n,) each.

    `start` and `size` are bytes, `height` and `width` pixels of the upright image.
    """

    ordinal: NDArray[np.int64]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]


@dataclass(frozen=True)
class ShardRecord:
    """One shard of an index.

    Attributes:
        name: file name, below the folder of the index.
        samples: usable samples.
        bytes, sha256: of the whole file.
        first_block: 512-byte block where the first sample begins.
        blocks, height, width: columns over all samples, used or not: 512-byte blocks from one sample to the next, and
            pixels of the upright image (0 where unknown), as written by `pack`.
        skip: ordinal of a sample that is left out, and the reason.
        note: what is wrong with the archive as a whole, or empty.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    first_block: int
    blocks: str
    height: str
    width: str
    skip: Mapping[int, str] = field(default_factory=dict)
    note: str = ""

    def table(self) -> SampleTable:
        """Where the usable samples lie."""
        blocks = unpack(self.blocks)
        start = (self.first_block + np.cumsum(blocks) - blocks) * 512
        used = np.ones(len(blocks), dtype=bool)
        used[[ordinal for ordinal in self.skip if ordinal < len(blocks)]] = False
        columns = (np.arange(len(blocks)), start, blocks * 512, unpack(self.height), unpack(self.width))
        return SampleTable(*(column[used] for column in columns))


@dataclass(frozen=True)
class Index:
    """The shards of one folder; `base` is the folder or the address that their names are below."""

    base: str
    shards: tuple[ShardRecord, ...]

    @property
    def samples(self) -> int:
        """Usable samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def url(self, shard: ShardRecord) -> str:
        """Path or address of a shard."""
        return f"{self.base.rstrip('/')}/{shard.name}"


def pack(column: Sequence[int] | NDArray[np.int64]) -> str:
    """A column of integers in [0, 2^32) as text: little-endian uint32, deflated, base64."""
    raw = np.asarray(column, dtype="<u4").tobytes()
    return base64.b64encode(zlib.compress(raw, 6)).decode("ascii")


def unpack(text: str) -> NDArray[np.int64]:
    """The column that `pack` wrote, as int64."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<u4").astype(np.int64)
