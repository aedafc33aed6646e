"""Build shards from parquet files with a column of images, streamed with only a few rows in memory."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hdm_lightning.datasets.rows import Columns, Table, TableRow, add_row_arguments, build_as_asked, state_of
from hdm_lightning.errors import UserError, first_line, import_optional
from hdm_lightning.printable import in_one_line

ROWS_AT_ONCE = 64
BUFFER_BYTES = 1 << 20


class ParquetTable(Table):
    """The rows of parquet files, one file after the other.

    Args:
        places: files, and folders whose `*.parquet` files are read, sorted by name; duplicates are read once.
        columns: the columns to read.

    Raises:
        UserError: pyarrow is missing, or a file cannot be read or lacks one of these columns.
    """

    def __init__(self, places: Sequence[str], columns: Columns) -> None:
        self.files, self.columns = _files(places), columns
        self.place = ", ".join(places)
        self._names = _told_apart(self.files)
        self.state = state_of(zip(self._names, self.files, strict=True))
        self.options = {"parquet": [str(file.resolve()) for file in self.files]}
        self._counts = [self._checked(file) for file in self.files]
        self.rows = sum(self._counts)

    def read(self, first: int) -> Iterator[TableRow]:
        """Yield the rows from `first` on."""
        for file, name, count in zip(self.files, self._names, self._counts, strict=True):
            if first < count:
                yield from self._of_file(file, name, first)
            first = max(0, first - count)

    def _checked(self, file: Path) -> int:
        """Check that the columns of a file can be used; return its number of rows."""
        with opened(file) as table:
            schema = table.schema_arrow
            self.columns.require_in(schema.names, str(file))
            for name in self.columns.named:
                if (several := schema.names.count(name)) > 1:
                    what = f"there are {several} columns {name!r}"
                    raise UserError(what, where=str(file), hint="rewrite the table with a different name for each")
            require_images(schema.field(self.columns.image), str(file))
            return int(table.metadata.num_rows)

    def _of_file(self, file: Path, name: str, first: int) -> Iterator[TableRow]:
        import pyarrow  # noqa: PLC0415  (optional)

        with opened(file) as table:
            wanted, begin = self._wanted(table.schema_arrow), 0
            for group in range(table.num_row_groups):
                count = table.metadata.row_group(group).num_rows
                if begin + count > first:
                    try:
                        yield from self._of_group(table, group, wanted, name, begin, first)
                    except (pyarrow.ArrowException, OSError, ValueError) as error:
                        raise _unreadable(file, error) from error
                begin += count

    def _of_group(
        self, table: Any, group: int, wanted: list[str], name: str, begin: int, first: int
    ) -> Iterator[TableRow]:
        """Yield the rows from `first` on of a row group that begins at row `begin`."""
        for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=wanted):
            if begin + len(batch) > first:
                skipped = max(0, first - begin)
                for row, values in enumerate(batch.slice(skipped).to_pylist(), start=begin + skipped):
                    yield TableRow(f"{name}#{row}", values)
            begin += len(batch)

    def _wanted(self, schema: Any) -> list[str]:
        plain = [field.name for field in schema if _is_plain(field.type)] if self.columns.kept is None else []
        return list(dict.fromkeys((*self.columns.named, *plain)))


def opened(file: Path) -> Any:
    """Open a parquet file, its pages read as needed. Raises UserError if it cannot be read or pyarrow is missing."""
    parquet = import_optional("pyarrow.parquet", "tables", where=str(file))
    import pyarrow  # noqa: PLC0415  (with it)

    try:
        return parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot be read ({first_line(error)})", where=str(file), hint="download it again, or name only the others"
    )


def require_images(field: Any, place: str) -> None:
    """Raise UserError if a column cannot hold the bytes of images."""
    from pyarrow import types  # noqa: PLC0415  (optional)

    kind = field.type
    if types.is_struct(kind) and any(each.name == "bytes" for each in kind):
        kind = kind.field("bytes").type
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind) or types.is_null(kind):
        return
    if types.is_string(kind) or types.is_large_string(kind):
        what = f"the column {field.name!r} holds text, not images"
        hint = (
            f"for URLs, run img2dataset --url_list {place} --input_format parquet --url_col {field.name}, then "
            "`hdm-shards build img2dataset` on its output; for files next to a table, use `hdm-shards build folder`"
        )
        raise UserError(what, where=place, hint=hint)
    what = f"the column {field.name!r} holds {kind}, not the bytes of images"
    raise UserError(what, where=place, hint="name a column of bytes, or of structs with bytes")


def _is_plain(kind: Any) -> bool:
    from pyarrow import types  # noqa: PLC0415  (optional)

    return any(
        is_one(kind)
        for is_one in (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    )


def _files(places: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            found += _below(place)
        elif place.is_file():
            found.append(place)
        else:
            raise UserError("there is no such file", where=str(place), hint="name parquet files, or a folder of them")
    once: dict[Path, Path] = {}
    for file in found:
        once.setdefault(file.resolve(), file)
    return list(once.values())


def _below(folder: Path) -> list[Path]:
    """Return the parquet files below a folder. Raises UserError if there are none, or a link to a folder elsewhere."""
    inside = sorted(folder.rglob("*"))
    for each in inside:
        if each.is_symlink() and each.is_dir() and not each.resolve().is_relative_to(folder.resolve()):
            what = f"is a link to a folder elsewhere ({in_one_line(each.resolve())}), which is not searched"
            raise UserError(what, where=str(each), hint="name that folder too, and remove the link")
    files = [each for each in inside if each.suffix.lower() == ".parquet" and each.is_file()]
    if not files:
        raise UserError("contains no .parquet files", where=str(folder), hint="name the files")
    return files


def _told_apart(files: Sequence[Path]) -> list[str]:
    """Return a name for each file: its own, preceded by as many parent folders as make all names distinct."""
    parts = [file.absolute().parts for file in files]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(file.resolve()) for file in files]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build parquet`."""
    parser.add_argument("files", nargs="+", metavar="FILES", help="parquet files, or folders of them")
    add_row_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build from the arguments and print a summary."""
    return build_as_asked(ParquetTable(arguments.files, Columns.of(arguments)), arguments)
