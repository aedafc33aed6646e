"""The journal in a set's folder: a header that says what the set is made of, then a line for each finished part.

By it a call that was ended goes on where it was, and one that would make something else is refused, unless the
folder holds nothing but what a call writes before its first part.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hdm_lightning.datasets.writer import require_no_shards
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import append_line, read_lines

ANEW = "name another --out, or delete this folder to make it anew"
LOCK = ".lock"
REJECTED = "rejected.tsv"


def holds_nothing(folder: Path, *own: str) -> bool:
    """Whether a folder has nothing to lose: calls into it have made nothing, and left only files of the names `own`."""
    return all(each.name in (*own, LOCK, REJECTED) for each in folder.iterdir())


def require_own(journal: Path) -> None:
    """Raise UserError where a folder has shards and no such journal, before anything is written into it."""
    if not os.path.lexists(journal):
        require_no_shards(journal.parent)


class Journal:
    """Lines of JSON below a header.

    Args:
        path: of the file, in the set's folder; nothing is written before `begin`.
        header: plain values that say what the set is made of.
        other: what to say of a folder whose header is another one.
        present: the header of an earlier version as one of now.

    Attributes:
        rows: what earlier calls have noted.

    Raises:
        UserError: the folder holds something else: another header, or shards without a journal.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], *, other: str, present: Callable[[Any], Any] = lambda found: found
    ) -> None:
        self.path, self.header, self._other, self._present = path, header, other, present
        self._claim: dict[str, Any] | None = None
        """The header of a call that has made nothing."""
        self.rows: list[dict[str, Any]] = self._lines(first=True)[1:]

    def begin(self) -> None:
        """Write the header, unless an earlier call has.

        Raises:
            UserError: another call has written another one meanwhile.
        """
        if not self._lines():
            self.path.unlink(missing_ok=True)
            append_line(self.path, self.header)

    def give_up(self) -> None:
        """Leave the folder to calls that make something else: this one has come to nothing."""
        self.path.unlink(missing_ok=True)

    def _lines(self, first: bool = False) -> list[dict[str, Any]]:
        """Header and rows; empty also where a full disk or a crash has left the beginning of a header, or the call
        that wrote another one has made nothing."""
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
        """Add a line, synced."""
        append_line(self.path, values)
