"""The record of one shard in an index, in memory and as JSON."""

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.index_columns import Integers, Packed, pack, unpack
from hdm_lightning.data.sample_table import MOST_MEMBERS, Form, Layout, SampleTable
from hdm_lightning.data.tar import BLOCK, is_unsafe
from hdm_lightning.errors import UserError

MOST_SAMPLES = 1 << 24
"""Maximum number of samples in one shard; a small file can claim more, whose columns would fill the memory."""

_COLUMNS = ("height", "width", "layout", "key_length", "check", "sizes")


@dataclass(frozen=True)
class ShardRecord:
    """One shard of an index. Columns have one number per sample, usable or not, and are packed as by `pack`.

    Attributes:
        name: file name, relative to the folder of the index.
        samples: number of usable samples.
        bytes, sha256: size and hash of the whole file.
        first_block: 512-byte block where the first sample begins.
        height, width: columns: pixels of the upright image, 0 if unknown.
        layouts, layout: the layouts in use, and the column of each sample's layout number.
        key_length: column: bytes of the key.
        sizes: columns: bytes of the first member of each sample, of the second member of those with two, and so on.
        check: column: lower 16 bits of a CRC-32 of the key and the beginning of each member.
        skip: ordinals of the samples that are left out, with the reasons.
        note: damage to the archive as a whole, or empty.
        others: number of members that no sample needs, by kind.
        changed: modification time of a local file in ns, 0 if unknown; ignored when records are compared.
        tag: version of a remote file: its ETag or time of last change; empty if unknown; ignored when comparing.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    first_block: int
    height: Packed
    width: Packed
    layouts: tuple[Layout, ...]
    layout: Packed
    key_length: Packed
    sizes: tuple[Packed, ...]
    check: Packed
    skip: Mapping[int, str] = field(default_factory=dict)
    note: str = ""
    others: Mapping[str, int] = field(default_factory=dict)
    changed: int = field(default=0, compare=False)
    tag: str = field(default="", compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with copies of mapped columns, for another process."""
        own = {name: bytes(getattr(self, name)) for name in _COLUMNS[:-1]} | {"sizes": tuple(map(bytes, self.sizes))}
        return ShardRecord, tuple(own.get(each.name, getattr(self, each.name)) for each in fields(self))

    def columns(self) -> tuple[Packed, ...]:
        """Return all columns, in the order of a columns file."""
        return self.height, self.width, self.layout, self.key_length, self.check, *self.sizes

    @property
    def count(self) -> int:
        """Number of samples, usable or not."""
        return self.samples + len(self.skip)

    def shapes(self) -> tuple[Integers, Integers]:
        """Return height and width in pixels of the usable samples, (samples,) each; 0 if unknown.

        Raises:
            UserError: the record contradicts itself.
        """
        with _naming(self.name):
            height, width = unpack(self.height, self.count), unpack(self.width, self.count)
        used = self._used()
        return height[used], width[used]

    def table(self) -> SampleTable:
        """Return the locations of the usable samples. Raises UserError: the record contradicts itself."""
        with _naming(self.name):
            layout, sizes = self._members()
            gaps = np.array([sum(gap for _, gap in each.members) + each.tail for each in self.layouts], dtype=np.int64)
            size = gaps[layout] * BLOCK + (-(-sizes // BLOCK) * BLOCK).sum(axis=1)
            start = self.first_block * BLOCK + np.cumsum(size) - size
            if self.first_block * BLOCK + size.sum(dtype=np.float64) > self.bytes:
                raise ValueError("samples lie beyond the end of the shard")
            key_length, check = unpack(self.key_length, self.count), unpack(self.check, self.count)
        ordinal = np.arange(self.count)
        return SampleTable(ordinal, start, size, layout, key_length, sizes, check, self.layouts).take(self._used())

    def _members(self) -> tuple[Integers, Integers]:
        """Return the layout of each sample (count,), and the sizes of its members (count, maximum members)."""
        layout = unpack(self.layout, self.count)
        members = np.array([len(each.members) for each in self.layouts], dtype=np.int64)
        if self.count and (layout.max() >= len(members) or members.max() > len(self.sizes)):
            raise ValueError("a layout is missing")
        own, sizes = members[layout], np.zeros((self.count, len(self.sizes)), dtype=np.int64)
        for turn, column in enumerate(self.sizes):
            has = own > turn
            sizes[has, turn] = unpack(column, int(has.sum()))
        return layout, sizes

    def _used(self) -> NDArray[np.bool_] | slice:
        """Return the mask or slice of the usable samples in a column."""
        if not self.skip:
            return slice(None)
        used = np.ones(self.count, dtype=bool)
        used[list(self.skip)] = False
        return used


def columns_of(forms: Sequence[Form], shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return the columns of a record for samples with these forms and (height, width), by attribute."""
    layouts = tuple(dict.fromkeys(form.layout for form in forms))
    number = {layout: place for place, layout in enumerate(layouts)}
    most = max((len(form.sizes) for form in forms), default=0)
    return {
        "height": pack([height for height, _ in shapes]),
        "width": pack([width for _, width in shapes]),
        "layouts": layouts,
        "layout": pack([number[form.layout] for form in forms]),
        "key_length": pack([form.key_length for form in forms]),
        "sizes": tuple(pack([form.sizes[turn] for form in forms if turn < len(form.sizes)]) for turn in range(most)),
        "check": pack([form.check for form in forms]),
    }


@contextmanager
def _naming(shard: str) -> Iterator[None]:
    """Turn a `ValueError` about a record into a `UserError` that names its shard."""
    try:
        yield
    except ValueError as error:
        what, hint = f"the index contradicts itself: {error}", "run `hdm-shards index` again"
        raise UserError(what, where=shard, hint=hint) from error


def as_entry(shard: ShardRecord) -> dict[str, Any]:
    """Return a record as a JSON object, including its columns."""
    return _entry(shard, lambda column: b64encode(column).decode("ascii"))


def entry_beside(shard: ShardRecord) -> dict[str, Any]:
    """Return a record as a JSON object, with the size in bytes of each column instead of the column."""
    return _entry(shard, len)


def _entry(shard: ShardRecord, of_column: Callable[[Packed], Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, bytes | memoryview):
            return of_column(value)
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return {str(key): each for key, each in value.items()} if isinstance(value, Mapping) else value

    return {each.name: plain(getattr(shard, each.name)) for each in fields(shard)}


def column_entries(entry: Mapping[str, Any]) -> list[Any]:
    """Return each column of an entry, or its size in bytes, in the order of `ShardRecord.columns`."""
    return [*(entry[name] for name in _COLUMNS[:-1]), *entry[_COLUMNS[-1]]]


def from_entry(entry: Mapping[str, Any], columns: Sequence[Packed] | None = None) -> ShardRecord:
    """Return the record of a JSON entry, with the columns in it unless `columns` are passed.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the entry is not a valid record.
    """
    plain: dict[str, Any] = {name: natural(entry[name]) for name in ("samples", "bytes", "first_block")}
    if columns is None:
        columns = [b64decode(column, validate=True) for column in column_entries(entry)]  # raises a kind of ValueError
    plain |= dict(zip(_COLUMNS[:-1], columns, strict=False))
    record = ShardRecord(
        name=str(entry["name"]),
        sha256=str(entry["sha256"]),
        layouts=tuple(_shared(_layout(*layout)) for layout in entry["layouts"]),
        sizes=tuple(columns[len(_COLUMNS) - 1 :]),
        skip={int(ordinal): str(reason) for ordinal, reason in (entry.get("skip") or {}).items()},
        note=str(entry.get("note", "")),
        others={str(kind): natural(number) for kind, number in (entry.get("others") or {}).items()},
        changed=natural(entry.get("changed", 0)),
        tag=str(entry.get("tag", "")),
        **plain,
    )
    if not record.name or "\0" in record.name or is_unsafe(record.name):
        raise ValueError(f"the name {record.name!r} is not inside the folder")
    if record.count * BLOCK > record.bytes or not all(0 <= ordinal < record.count for ordinal in record.skip):
        raise ValueError(f"{record.name!r} cannot hold {record.samples} samples")
    if record.count > MOST_SAMPLES or len(record.sizes) > MOST_MEMBERS:
        raise ValueError(f"{record.name!r} is not a shard: {record.count} samples, {len(record.sizes)} members each")
    return record


@lru_cache(maxsize=1 << 12)
def _shared(layout: Layout) -> Layout:
    """Return one shared copy of equal layouts."""
    return layout


def _layout(key_at: Any, members: Any, tail: Any) -> Layout:
    return Layout(natural(key_at, -1), tuple((str(name), natural(gap)) for name, gap in members), natural(tail))


def natural(value: Any, least: int = 0) -> int:
    """Return a whole number of an entry. Raises ValueError: it is not one, or is below `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 62:
        raise ValueError(f"expected a number, got {value!r}")
    return value
