"""The journal in a set's folder: a header that identifies what the set is made of, then a line per finished part.

With it an interrupted call resumes where it stopped, and one that would make something else is refused, unless the
folder holds only what a call writes before its first part.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hdm_lightning.datasets.writer import require_no_shards
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import append_line, read_lines, write_atomically

ANEW = "name another --out, or delete this folder to start again"
LOCK = ".lock"
REJECTED = "rejected.tsv"


def holds_nothing(folder: Path, *own: str) -> bool:
    """Return whether a folder has nothing to lose: earlier calls left nothing in it but files named in `own`."""
    return all(each.name in (*own, LOCK, REJECTED) for each in folder.iterdir())


def write_rejected(folder: Path, rejected: Iterable[Sequence[str]]) -> None:
    """Write `rejected.tsv`: a line for each (name, reason) of what a set leaves out."""
    lines = (f"{in_one_line(name)}\t{in_one_line(reason)}\n".encode() for name, reason in rejected)
    write_atomically(folder / REJECTED, lambda file: file.writelines(lines))


class Journal:
    """Lines of JSON below a header.

    Args:
        path: the file, in the set's folder; nothing is written before `begin`.
        header: plain values that identify what the set is made of.
        other: message for a folder with a different header.
        present: converts a header of an earlier version to the current form.

    Attributes:
        rows: lines noted by earlier calls.

    Raises:
        UserError: the folder holds something else: another header, or shards without a journal.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], *, other: str, present: Callable[[Any], Any] = lambda found: found
    ) -> None:
        self.path, self.header, self._other, self._present = path, header, other, present
        self._claim: dict[str, Any] | None = None
        """The header of another call that has made nothing."""
        self.rows: list[dict[str, Any]] = self._lines(first=True)[1:]

    def begin(self) -> None:
        """Write the header, unless an earlier call has.

        Raises:
            UserError: another call has written a different one meanwhile.
        """
        if not self._lines():
            self.path.unlink(missing_ok=True)
            append_line(self.path, self.header)

    def give_up(self) -> None:
        """Delete the journal, as this call made nothing, so that other calls may use the folder."""
        self.path.unlink(missing_ok=True)

    def _lines(self, first: bool = False) -> list[dict[str, Any]]:
        """Return header and rows; empty also if a full disk or a crash cut the header short, or if the call that wrote
        a different one made nothing."""
        lines = read_lines(self.path)
        if not lines:
            require_no_shards(self.path.parent)
        elif self._present(lines[0]) != json.loads(json.dumps(self.header)):
            nothing = len(lines) == 1 and holds_nothing(self.path.parent, self.path.name)
            if nothing and (first or lines[0] == self._claim):
                self._claim = lines[0]
                return []
            raise UserError(self._other, where=str(self.path.parent), hint=ANEW)
        return lines

    def note(self, **values: Any) -> None:
        """Append a line and sync it to disk."""
        append_line(self.path, values)
