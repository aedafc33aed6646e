"""Builds shards from a table whose rows hold images and captions, read as a stream from any row on.

Shard i holds what becomes of the rows from i·n on. A journal has one line a finished shard, so that a build that was
interrupted goes on with the next one; of a table that has changed since all is built again.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hdm_lightning.data.captions import MAX_CAPTION_BYTES, CaptionRules, is_blank
from hdm_lightning.data.decode import MAX_FILE_BYTES
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.index import INDEX_NAME
from hdm_lightning.data.parallel import available_cores, progress_bar
from hdm_lightning.datasets.build import JOURNAL, Report, Row, ShardJournal, finish, has_caption
from hdm_lightning.datasets.shard_work import ahead, building_in
from hdm_lightning.datasets.source_images import (
    ImageOptions,
    add_shared_arguments,
    image_field,
    image_options,
    whole_number,
)
from hdm_lightning.datasets.writer import Field, write_shard
from hdm_lightning.errors import UserError

MOST_TEXT = 1 << 12
"""Letters of a text column that is no caption and goes into the record."""

SHARD = "shard-{:05d}.tar"


class TableRow(NamedTuple):
    """A row: what it is called in reports, and its values by column."""

    name: str
    values: Mapping[str, Any]


class Table(Protocol):
    """Where rows come from."""

    @property
    def place(self) -> str:
        """What it is called."""

    @property
    def options(self) -> Mapping[str, Any]:
        """What tells it from another one."""

    @property
    def state(self) -> str:
        """What changes when that which lies in it does."""

    @property
    def rows(self) -> int | None:
        """How many rows there are; None where that is not known."""

    def read(self, first: int) -> Iterator[TableRow]:
        """The rows from one on."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Attributes:
        image: bytes of an image file, or a struct of `bytes` and `path`.
        captions: texts, or lists of them; one alone becomes the text of a sample, of several each becomes a caption
            in its record whose kind is the column's name.
        kept: further columns that go into the record; None takes all numbers, truth values and short texts.
    """

    image: str
    captions: tuple[str, ...] = ()
    kept: tuple[str, ...] | None = None


def build_rows(
    table: Table,
    out: Path,
    columns: Columns,
    *,
    images: ImageOptions | None = None,
    allow_missing: bool = False,
    samples_per_shard: int = 1000,
    threads: int | None = None,
    anew: bool = False,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Write shards of all rows, their index and `rejected.tsv`, one line a row that was not used.

    Args:
        table, out, columns: rows, where the shards go, and which columns count.
        images: how images are encoded; None leaves them as they are.
        allow_missing: keep images without a caption.
        samples_per_shard: rows a shard; rejected ones leave it smaller.
        threads: that check and encode images side by side; None means one a core.
        anew, say: as for `build_shards`.

    Raises:
        UserError: no row can be used, or the folder holds another build.
    """
    images = images or ImageOptions()
    header = {**table.options, **asdict(columns), "allow_missing": allow_missing, **asdict(images)}
    with building_in(out / JOURNAL):
        journal = ShardJournal(out, {**header, "samples_per_shard": samples_per_shard})
        found = journal.shards
        done = {} if anew else _finished(out, found, table, samples_per_shard)
        if found and say is not None:
            say(_what_was_found(len(done), len(found), anew))
        make = partial(made_of_row, columns, images, allow_missing)
        total = None if table.rows is None else math.ceil(table.rows / samples_per_shard)
        with progress_bar("shards", total) as show, ThreadPoolExecutor(threads or available_cores()) as pool:
            show(len(done))
            if not _is_over(done, samples_per_shard, table.rows):
                (out / INDEX_NAME).unlink(missing_ok=True)
                rows = table.read(len(done) * samples_per_shard)
                while part := list(islice(rows, 1)):
                    number, name = len(done), SHARD.format(len(done))
                    stream = chain(part, islice(rows, samples_per_shard - 1))
                    done[name] = _write(out / name, number * samples_per_shard, stream, make, pool, table.state)
                    journal.note(shard=name, **done[name]._asdict())
                    show(len(done))
        journal.remove(found.keys() - done.keys())
        if not done:
            journal.give_up()
            raise UserError("has no rows", where=table.place, hint="name another table")
        return finish(out, done, (), threads or available_cores())


def _finished(out: Path, found: Mapping[str, Row], table: Table, samples_per_shard: int) -> dict[str, Row]:
    """The shards of an earlier call that are whole, up to the first that is not or has not the rows that it should."""
    done: dict[str, Row] = {}
    while (row := found.get(name := SHARD.format(len(done)))) is not None:
        if _state_of(row) != table.state or (row.samples and not (out / name).is_file()):
            break
        left = None if table.rows is None else table.rows - len(done) * samples_per_shard
        if left is not None and _rows_of(row) != max(0, min(left, samples_per_shard)):
            break
        done[name] = row
    return done


def _state_of(row: Row) -> str:
    return row.digest.partition(" ")[0]


def _rows_of(row: Row) -> int:
    count = row.digest.partition(" ")[2]
    return int(count) if count.isdecimal() else 0


def _is_over(done: Mapping[str, Row], samples_per_shard: int, rows: int | None) -> bool:
    """Whether the last finished shard was the table's last: it has fewer rows than the others, or all are used."""
    last = [_rows_of(row) for row in list(done.values())[-1:]]
    return (bool(last) and last[0] < samples_per_shard) or (rows is not None and len(done) * samples_per_shard >= rows)


def _what_was_found(kept: int, before: int, anew: bool) -> str:
    if anew or kept < before:
        again = "all are built again" if not kept else f"{kept} are as they were, the others are built again"
        return f"built before, {before} shards: {again}"
    return f"built before, {kept} shards, which stay as they are (--anew builds them again)"


def _write(
    path: Path,
    first: int,
    rows: Iterator[TableRow],
    make: Callable[[TableRow], dict[str, Field]],
    pool: ThreadPoolExecutor,
    state: str,
) -> Row:
    """Write one shard of some rows; returns its row of the journal."""
    samples: dict[str, dict[str, Field]] = {}
    rejected: list[list[str]] = []
    count = 0
    coming = ((row.name, pool.submit(make, row)) for row in rows)
    for name, future in ahead(coming, 2 * available_cores()):
        try:
            samples[f"{first + count:08d}"] = future.result()
        except SampleFault as fault:
            rejected.append([name, str(fault)])
        count += 1
    if samples:
        write_shard(path, samples)
    else:
        path.unlink(missing_ok=True)
    captions = sum(has_caption(fields) for fields in samples.values())
    return Row(f"{state} {count}", len(samples), len(samples), captions, rejected, [])


def made_of_row(columns: Columns, images: ImageOptions, allow_missing: bool, row: TableRow) -> dict[str, Field]:
    """The fields of the sample that a row becomes.

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
    return {**image_field(_image_bytes(row.values.get(columns.image)), images), **fields, "json": record}


def _image_bytes(value: Any) -> bytes:
    """The bytes of an image file. Raises SampleFault: there are none, or too many."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes | bytearray | memoryview) or not len(data):
        path = isinstance(value, Mapping) and value.get("path")
        named = "the row names a file and does not hold it (hdm-shards build folder takes files)"
        raise SampleFault(named if path else "the row holds no image")
    if len(data) > MAX_FILE_BYTES:
        raise SampleFault(f"image file too large: {len(data)} bytes")
    return bytes(data)


def _texts(name: str, value: Any) -> Iterator[str]:
    """The captions in a cell. Raises SampleFault: it holds something else than texts, or one that is too long."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if each is None:
            continue
        if not isinstance(each, str):
            raise SampleFault(f"a caption is no text (column {name})")
        if len(each.encode("utf-8", "replace")) > MAX_CAPTION_BYTES:
            raise SampleFault(f"caption too long: {len(each)} letters (column {name})")
        yield each


def _kept(columns: Columns, values: Mapping[str, Any]) -> dict[str, object]:
    """Other columns of a row as a record can have them; names that have a meaning there get `hdm_` before them."""
    used = {columns.image, *columns.captions}
    names = [name for name in values if name not in used] if columns.kept is None else columns.kept
    plain = {name: _plain(values.get(name)) for name in names}
    taken = {"source", "captions", *CaptionRules().fields}
    return {f"hdm_{name}" if name in taken else name: each for name, each in plain.items() if each is not None}


def _plain(value: Any) -> object:
    """A number, truth value or short text; None for all else, such as numbers that JSON has not."""
    if isinstance(value, bool | int):
        return value if abs(value) < 1 << 63 else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str) and len(value) <= MOST_TEXT else None


def add_row_arguments(parser: argparse.ArgumentParser, *, image: str | None = None) -> None:
    """Options that all builders from tables share; `image` is the column unless told otherwise."""
    parser.add_argument(
        "--image", required=image is None, default=image, metavar="COLUMN", help="bytes of an image file"
    )
    parser.add_argument("--caption", nargs="+", default=[], metavar="COLUMN", help="texts; of several each is a kind")
    parser.add_argument("--keep", nargs="*", metavar="COLUMN", help="others for the records (default: plain values)")
    add_shared_arguments(parser)
    parser.add_argument("--threads", type=whole_number(1), help="that check images (default: one a core)")


def columns_of(arguments: argparse.Namespace) -> Columns:
    """The columns that `add_row_arguments` asked for.

    Raises:
        UserError: no caption is named, and images without one are not to stay.
    """
    if not arguments.caption and not arguments.allow_missing:
        hint = "name its column, or add --allow-missing (hdm-shards caption makes captions later)"
        raise UserError("no column with captions is named", where="--caption", hint=hint)
    kept: Sequence[str] | None = arguments.keep
    return Columns(arguments.image, tuple(arguments.caption), None if kept is None else tuple(kept))


def build_as_asked(table: Table, arguments: argparse.Namespace) -> int:
    """Build as `add_row_arguments` asked, and print what was written."""
    report = build_rows(
        table,
        arguments.out,
        columns_of(arguments),
        images=image_options(arguments),
        allow_missing=arguments.allow_missing,
        samples_per_shard=arguments.samples_per_shard,
        threads=arguments.threads,
        anew=arguments.anew,
        say=print,
    )
    print(report.told(arguments.out))
    return 0
