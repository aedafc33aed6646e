"""What the shards of a folder hold: `index.json`, beside them, and the records in it.

The index says for each shard how many usable samples it has, its size and SHA-256, and where each sample and each of
its members begins, so that any sample of any shard is one read of a known range. Samples that can never be used (no
image, unsafe names, a key that stands twice, or found bad by `hdm-shards verify`) are named in `skip` and belong to
no plan.
"""

import base64
import binascii
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.members import Columns, Layout, SampleTable, unpack_rows
from hdm_lightning.data.storage import is_local, read_whole
from hdm_lightning.data.tar import BLOCK, is_unsafe
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import replacing

FORMAT = 2
READABLE = (1, 2)
"""Formats that can be read; the first one has no members, so that its samples are parsed."""

INDEX_NAME = "index.json"


@dataclass(frozen=True)
class ShardRecord:
    """One shard of an index.

    Attributes:
        name: file name, below the folder of the index.
        samples: usable samples.
        bytes, sha256: of the whole file.
        first_block: 512-byte block where the first sample begins.
        columns: where all samples and their members lie, used or not.
        skip: ordinal of a sample that is left out, and the reason.
        note: what is wrong with the archive as a whole, or empty.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    first_block: int
    columns: Columns
    skip: Mapping[int, str] = field(default_factory=dict)
    note: str = ""

    @property
    def count(self) -> int:
        """Samples, used or not."""
        return self.samples + len(self.skip)

    def shapes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Height and width in pixels of the usable samples, int64 (samples,) each; 0 where unknown.

        Raises:
            UserError: the record contradicts itself.
        """
        with _naming(self.name):
            height, width = self.columns.shapes(self.count)
        used = self._used()
        return height[used], width[used]

    def table(self) -> SampleTable:
        """Where the usable samples lie.

        Raises:
            UserError: the record contradicts itself.
        """
        with _naming(self.name):
            height, width = self.columns.shapes(self.count)
            forms = self.columns.forms(self.count) if self.columns.blocks is None else None
            size = forms.range_bytes() if forms else unpack_rows(self.columns.blocks or b"", self.count) * BLOCK
            start = self.first_block * BLOCK + np.cumsum(size) - size
            if self.first_block * BLOCK + size.sum(dtype=np.float64) > self.bytes:
                raise ValueError("samples lie beyond the end of the shard")
        return SampleTable(np.arange(self.count), start, size, height, width, forms).take(self._used())

    def _used(self) -> NDArray[np.bool_]:
        used = np.ones(self.count, dtype=bool)
        used[list(self.skip)] = False
        return used


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


@contextmanager
def _naming(shard: str) -> Iterator[None]:
    """Turn what is wrong with a record into a `UserError` that names its shard."""
    try:
        yield
    except ValueError as error:
        what, hint = f"the index contradicts itself: {error}", "run `hdm-shards index` again"
        raise UserError(what, where=shard, hint=hint) from error


def write_index(index: Index, path: Path) -> None:
    """Write an index so that a reader sees the old one or the new one, never a part."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        handle.write(f'{{"format": {FORMAT}, "samples": {index.samples}, "shards": [\n')
        handle.write(",\n".join(json.dumps(as_entry(shard)) for shard in index.shards))
        handle.write("\n]}\n")


def load_index(location: str | os.PathLike[str]) -> Index:
    """The index of a folder, local or remote, or an index file itself (a name that ends in .json).

    Raises:
        UserError: there is no index, or it cannot be read.
    """
    file = index_file(location)
    try:
        raw = read_whole(file)
    except OSError as error:
        raise _no_index(os.fspath(location), file, error) from error
    return _parse(raw, file)


def index_file(location: str | os.PathLike[str]) -> str:
    """Path or address of the index of a folder, or of an index file itself."""
    text = os.fspath(location)
    return text if text.endswith(".json") else f"{text.rstrip('/')}/{INDEX_NAME}"


def _no_index(location: str, file: str, error: OSError) -> UserError:
    make = "`hdm-shards build --help` tells how to make some"
    if is_local(location) and not Path(location).exists():
        return UserError("there is no such folder", where=location, hint=f"give the folder of your shards; {make}")
    if Path(location).is_dir() and not any(Path(location).glob("*.tar")):
        return UserError("there are no shards (.tar) in this folder", where=location, hint=make)
    if not isinstance(error, FileNotFoundError):
        hint = "check the address, and whether you may read it"
        return UserError(f"the index of the shards cannot be read ({error})", where=file, hint=hint)
    return UserError("there is no index of the shards", where=file, hint=_index_command(location))


def _index_command(location: str) -> str:
    """What makes the index that is missing at a location."""
    if location.endswith(".json"):
        return "check `index` of the source"
    if is_local(location):
        return f"run `hdm-shards index {location}`"
    return (
        f"write one with `hdm-shards index '{location.rstrip('/')}/{{0000..0099}}.tar' --out index.json` and upload it "
        "beside the shards, or name it as `index` of the source"
    )


def _parse(raw: bytes, file: str) -> Index:
    try:
        document = json.loads(raw)
        if document["format"] not in READABLE:
            raise UserError(
                f"index format {document['format']} was written by another version; this one reads up to {FORMAT}",
                where=file,
                hint="run `hdm-shards index` again",
            )
        shards = tuple(from_entry(entry) for entry in document["shards"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        hint = "run `hdm-shards index` again"
        raise UserError(f"the index cannot be read ({error!r})", where=file, hint=hint) from error
    return Index(file.rpartition("/")[0] or ".", shards)


def as_entry(shard: ShardRecord) -> dict[str, Any]:
    """A record as JSON has it."""
    columns = shard.columns
    entry = {
        "name": shard.name,
        "samples": shard.samples,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        "first_block": shard.first_block,
        "height": _encoded(columns.height),
        "width": _encoded(columns.width),
    }
    if columns.blocks is not None:
        entry |= {"blocks": _encoded(columns.blocks)}
    else:
        entry |= {
            "layouts": [
                [each.key_at, [list(member) for member in each.members], each.tail] for each in columns.layouts
            ],
            "layout": _encoded(columns.layout),
            "key_length": _encoded(columns.key_length),
            "sizes": [_encoded(column) for column in columns.sizes],
            "check": _encoded(columns.check),
        }
    return {**entry, "skip": {str(ordinal): reason for ordinal, reason in shard.skip.items()}, "note": shard.note}


def from_entry(entry: Mapping[str, Any]) -> ShardRecord:
    """The record of an entry.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    columns = Columns(_decoded(entry["height"]), _decoded(entry["width"]))
    if "blocks" in entry:
        columns = replace(columns, blocks=_decoded(entry["blocks"]))
    else:
        columns = replace(
            columns,
            layouts=tuple(_layout(*layout) for layout in entry["layouts"]),
            layout=_decoded(entry["layout"]),
            key_length=_decoded(entry["key_length"]),
            sizes=tuple(map(_decoded, entry["sizes"])),
            check=_decoded(entry["check"]),
        )
    record = ShardRecord(
        name=str(entry["name"]),
        samples=_natural(entry["samples"]),
        bytes=_natural(entry["bytes"]),
        sha256=str(entry["sha256"]),
        first_block=_natural(entry["first_block"]),
        columns=columns,
        skip={int(ordinal): str(reason) for ordinal, reason in (entry.get("skip") or {}).items()},
        note=str(entry.get("note", "")),
    )
    _require_sense(record)
    return record


def _layout(key_at: Any, members: Any, tail: Any) -> Layout:
    return Layout(_natural(key_at, -1), tuple((str(name), _natural(gap)) for name, gap in members), _natural(tail))


def _require_sense(record: ShardRecord) -> None:
    if not record.name or "\0" in record.name or is_unsafe(record.name):
        raise ValueError(f"the name {record.name!r} is not below the folder")
    if record.count * BLOCK > record.bytes or not all(0 <= ordinal < record.count for ordinal in record.skip):
        raise ValueError(f"{record.name!r} cannot hold {record.samples} samples")


def _natural(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 62:
        raise ValueError(f"{value!r} where a number was expected")
    return value


def _encoded(column: bytes) -> str:
    return base64.b64encode(column).decode("ascii")


def _decoded(column: str) -> bytes:
    try:
        return base64.b64decode(column, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a column cannot be decoded ({error})") from error
