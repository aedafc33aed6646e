"""What the shards of a folder hold: `index.json`, written beside them.

The index says for each shard how many usable samples it has, its size and SHA-256, and where each sample begins, so
that any sample of any shard is one read of a known range. Samples that can never be used (no image, unsafe names, a
key that stands twice, or found bad by `hdm-shards verify`) are named in `skip` and belong to no plan.
"""

import base64
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.errors import UserError

FORMAT = 1
INDEX_NAME = "index.json"


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


def index_shards(
    folder: str | os.PathLike[str],
    *,
    jobs: int = 1,
    progress: Callable[[ShardRecord], None] | None = None,
) -> Index:
    """Read every `*.tar` below a folder and write its `index.json`.

    Args:
        folder: a local folder.
        jobs: processes that read side by side.
        progress: called after each shard.

    Raises:
        UserError: the folder is missing or has no shard.
    """
    from hdm_lightning.data.scanning import scan_shards  # noqa: PLC0415 (scanning needs the records of this module)

    root = Path(folder)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.tar")) if root.is_dir() else []
    if not names:
        raise UserError("there is no .tar file here", where=str(root), mend="give the folder that holds the shards")
    index = Index(str(root), tuple(scan_shards(root, names, jobs=jobs, progress=progress)))
    write_index(index, root / INDEX_NAME)
    return index


def write_index(index: Index, path: Path) -> None:
    """Write an index so that a reader sees the old one or the new one, never a part."""
    document = {"format": FORMAT, "samples": index.samples, "shards": [asdict(shard) for shard in index.shards]}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump(document, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def load_index(location: str | os.PathLike[str]) -> Index:
    """The index of a folder, local or remote, or an index file itself (a name that ends in .json).

    Raises:
        UserError: there is no index, or it cannot be read.
    """
    from hdm_lightning.data.storage import read_whole  # noqa: PLC0415 (storage is heavier than a local index needs)

    text = os.fspath(location)
    file = text if text.endswith(".json") else f"{text.rstrip('/')}/{INDEX_NAME}"
    try:
        raw = read_whole(file)
    except OSError as error:
        mend = f"run `hdm-shards index {text}`"
        raise UserError(f"there is no index of the shards ({error})", where=file, mend=mend) from error
    return _parse(raw, file)


def _parse(raw: bytes, file: str) -> Index:
    try:
        document = json.loads(raw)
        if document["format"] != FORMAT:
            raise UserError(
                f"index format {document['format']} was written by another version; this one reads {FORMAT}",
                where=file,
                mend="run `hdm-shards index` again",
            )
        shards = tuple(_record(entry) for entry in document["shards"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        mend = "run `hdm-shards index` again"
        raise UserError(f"the index cannot be read ({error!r})", where=file, mend=mend) from error
    return Index(document.get("base") or file.rpartition("/")[0] or ".", shards)


def _record(entry: Mapping[str, object]) -> ShardRecord:
    known = {name: entry[name] for name in ShardRecord.__dataclass_fields__ if name in entry}
    skip = entry.get("skip") or {}
    known["skip"] = {int(ordinal): str(reason) for ordinal, reason in skip.items()}  # type: ignore[attr-defined]
    return ShardRecord(**known)  # type: ignore[arg-type]
