"""Build shards from a table whose rows hold images and captions, read as a stream from any row on.

Shard i holds the samples made from the n rows from i·n on. A journal has one line per finished shard, so an interrupted
build resumes with the next one; if the table has changed since, all shards are built again.
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hdm_lightning.argument_types import whole_number
from hdm_lightning.data.captions import MAX_CAPTION_BYTES, CaptionRules, is_blank
from hdm_lightning.data.decode import MAX_FILE_BYTES
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.index import INDEX_NAME
from hdm_lightning.data.parallel import available_cores, progress_bar
from hdm_lightning.datasets.build import JOURNAL, Item, Made, Report, Row, ShardJournal, finish, write_made
from hdm_lightning.datasets.shard_work import ahead, building_in
from hdm_lightning.datasets.source_images import ImageOptions, add_shared_arguments, image_field, image_options
from hdm_lightning.datasets.writer import Field
from hdm_lightning.errors import UserError, did_you_mean

MOST_TEXT = 1 << 12
"""Most characters of a text that is not a caption and goes into the record."""

SHARD = "shard-{:05d}.tar"


class TableRow(NamedTuple):
    """A row: its name in reports, and its values by column."""

    name: str
    values: Mapping[str, Any]


def state_of(files: Iterable[tuple[str, Path]]) -> str:
    """Return a hash that changes with some files, given with their names."""
    states = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Attributes:
        image: bytes of an image file, or a struct of `bytes` and `path`.
        captions: texts, or lists of them; a single one becomes the text of the sample, several become captions in its
            record, with the column's name as their kind.
        kept: further columns that go into the record; None takes all numbers, booleans and short texts.
    """

    image: str
    captions: tuple[str, ...] = ()
    kept: tuple[str, ...] | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Columns":
        """Return the columns from the arguments of `add_row_arguments`.

        Raises:
            UserError: no caption column is named, and images without a caption are not allowed.
        """
        if not arguments.caption and not arguments.allow_missing:
            hint = "name one, or add --allow-missing (hdm-shards caption can make captions later)"
            raise UserError("no column of captions is named", where="--caption", hint=hint)
        kept = None if arguments.keep is None else tuple(arguments.keep)
        return cls(arguments.image, tuple(arguments.caption), kept)

    @property
    def named(self) -> tuple[str, ...]:
        """All columns that are named."""
        return (self.image, *self.captions, *(self.kept or ()))

    def require_in(self, known: Collection[str], where: str) -> None:
        """Raise UserError if a table, `where`, lacks one of the named columns."""
        for name in self.named:
            if name not in known:
                raise UserError(f"there is no column {name!r}", where=where, hint=did_you_mean(name, known))


class Table(Protocol):
    """A source of rows.

    Attributes:
        place: its name.
        columns: the columns to use.
        options: values that identify it.
        state: a text that changes when its content does.
        rows: number of rows; None if unknown.
    """

    place: str
    columns: Columns
    options: Mapping[str, Any]
    state: str
    rows: int | None

    def read(self, first: int) -> Iterator[TableRow]:
        """Yield the rows from `first` on."""


def build_rows(
    table: Table,
    out: Path,
    *,
    images: ImageOptions | None = None,
    allow_missing: bool = False,
    samples_per_shard: int = 1000,
    threads: int | None = None,
    anew: bool = False,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Write shards of all rows, their index and `rejected.tsv`, which has one line per unused row.

    Args:
        table, out: rows, and folder for the shards.
        images: how images are encoded; None leaves them as they are.
        allow_missing: keep images without a caption.
        samples_per_shard: rows per shard; a shard with rejected ones is smaller.
        threads: threads that check and encode images; None means one per core.
        anew, say: as for `build_shards`.

    Raises:
        UserError: no row can be used, or the folder holds another build.
    """
    images = images or ImageOptions()
    header = {**table.options, **asdict(table.columns), "allow_missing": allow_missing, **asdict(images)}
    with building_in(out / JOURNAL):
        journal = ShardJournal(out, {**header, "samples_per_shard": samples_per_shard})
        found = journal.shards
        done = {} if anew else _finished(out, found, table, samples_per_shard)
        if found and say is not None:
            say(_what_was_found(len(done), len(found), anew))
        make = partial(made_of_row, table.columns, images, allow_missing)
        total = None if table.rows is None else math.ceil(table.rows / samples_per_shard)
        with progress_bar("shards", total) as show, ThreadPoolExecutor(threads or available_cores()) as pool:
            show(len(done))
            if not _is_over(done, samples_per_shard, table.rows):
                (out / INDEX_NAME).unlink(missing_ok=True)
                rows = table.read(len(done) * samples_per_shard)
                while part := list(islice(rows, 1)):
                    first, name = len(done) * samples_per_shard, SHARD.format(len(done))
                    stream = chain(part, islice(rows, samples_per_shard - 1))
                    coming = ((Item(row.name), pool.submit(make, row).result) for row in stream)
                    row = write_made(out / name, first, ahead(coming, 2 * available_cores()))
                    done[name] = row._replace(digest=_digest_of(row, table))
                    journal.note(shard=name, **done[name]._asdict())
                    show(len(done))
        journal.remove(found.keys() - done.keys())
        if not done:
            journal.give_up()
            raise UserError("has no rows", where=table.place, hint="name another table")
        return finish(out, done, (), threads or available_cores())


def _finished(out: Path, found: Mapping[str, Row], table: Table, samples_per_shard: int) -> dict[str, Row]:
    """Return the shards of an earlier call, up to the first that is missing, outdated or has the wrong rows."""
    done: dict[str, Row] = {}
    while (row := found.get(name := SHARD.format(len(done)))) is not None:
        if row.digest != _digest_of(row, table) or (row.samples and not (out / name).is_file()):
            break
        left = None if table.rows is None else table.rows - len(done) * samples_per_shard
        if left is not None and _rows_of(row) != max(0, min(left, samples_per_shard)):
            break
        done[name] = row
    return done


def _digest_of(row: Row, table: Table) -> str:
    return f"{table.state} {_rows_of(row)}"


def _rows_of(row: Row) -> int:
    return row.samples + len(row.rejected)


def _is_over(done: Mapping[str, Row], samples_per_shard: int, rows: int | None) -> bool:
    """Return whether the last finished shard was the table's last: it is smaller than the others, or no row is left."""
    last = [_rows_of(row) for row in list(done.values())[-1:]]
    return (bool(last) and last[0] < samples_per_shard) or (rows is not None and len(done) * samples_per_shard >= rows)


def _what_was_found(kept: int, before: int, anew: bool) -> str:
    if anew or kept < before:
        again = "all are rebuilt" if not kept else f"{kept} are kept, the others are rebuilt"
        return f"built before, {before} shards: {again}"
    return f"built before, {kept} shards, which are kept (--anew rebuilds them)"


def made_of_row(columns: Columns, images: ImageOptions, allow_missing: bool, row: TableRow) -> Made:
    """Return the sample made from a row.

    Raises:
        SampleFault: its image or its captions cannot be used.
    """
    captions = [(name, text) for name in columns.captions for text in _texts(name, row.values.get(name))]
    captions = [(name, text) for name, text in captions if not is_blank(text)]
    if not captions and not allow_missing:
        raise SampleFault("no caption")
    record: dict[str, object] = {"source": row.name, **_kept(columns, row.values)}
    fields: dict[str, Field] = {}
    if len(captions) == 1 and len(columns.captions) == 1:
        fields["txt"] = captions[0][1]
    elif captions:
        record["captions"] = [{"text": text, "kind": name} for name, text in captions]
    return Made({**image_field(_image_bytes(row.values.get(columns.image)), images), **fields, "json": record})


def _image_bytes(value: Any) -> bytes:
    """Return the bytes of an image file. Raises SampleFault if there are none, or too many."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes | bytearray | memoryview) or not len(data):
        path = isinstance(value, Mapping) and value.get("path")
        named = "the row names a file but does not contain it (use hdm-shards build folder for files)"
        raise SampleFault(named if path else "the row contains no image")
    if len(data) > MAX_FILE_BYTES:
        raise SampleFault(f"image file too large: {len(data)} bytes")
    return bytes(data)


def _texts(name: str, value: Any) -> Iterator[str]:
    """Yield the captions in a cell. Raises SampleFault if one is not text, or too long."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if each is None:
            continue
        if not isinstance(each, str):
            raise SampleFault(f"a caption is not text (column {name})")
        if len(each.encode("utf-8", "replace")) > MAX_CAPTION_BYTES:
            raise SampleFault(f"caption too long: {len(each)} characters (column {name})")
        yield each


def _kept(columns: Columns, values: Mapping[str, Any]) -> dict[str, object]:
    """Return other columns of a row for the record; names that have a meaning there get the prefix `hdm_`."""
    used = {columns.image, *columns.captions}
    names = [name for name in values if name not in used] if columns.kept is None else columns.kept
    plain = {name: _plain(values.get(name)) for name in names}
    taken = {"source", "captions", *CaptionRules().fields}
    return {f"hdm_{name}" if name in taken else name: each for name, each in plain.items() if each is not None}


def _plain(value: Any) -> object:
    """Return a number, boolean or short text; None for anything else, such as numbers that JSON does not have."""
    if isinstance(value, bool | int):
        return value if abs(value) < 1 << 63 else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str) and len(value) <= MOST_TEXT else None


def add_row_arguments(parser: argparse.ArgumentParser, *, image: str | None = None) -> None:
    """Add the options that all builders from tables share; `image` is the default column of images."""
    parser.add_argument(
        "--image", required=image is None, default=image, metavar="COLUMN", help="bytes of an image file"
    )
    parser.add_argument("--caption", nargs="+", default=[], metavar="COLUMN", help="texts; each of several is a kind")
    parser.add_argument("--keep", nargs="*", metavar="COLUMN", help="extra columns to keep (default: all plain values)")
    add_shared_arguments(parser)
    parser.add_argument("--threads", type=whole_number(1), help="threads that check images (default: one per core)")


def build_as_asked(table: Table, arguments: argparse.Namespace) -> int:
    """Build from the arguments of `add_row_arguments` and print a summary."""
    report = build_rows(
        table,
        arguments.out,
        images=image_options(arguments),
        allow_missing=arguments.allow_missing,
        samples_per_shard=arguments.samples_per_shard,
        threads=arguments.threads,
        anew=arguments.anew,
        say=print,
    )
    print(report.told(arguments.out))
    return 0
