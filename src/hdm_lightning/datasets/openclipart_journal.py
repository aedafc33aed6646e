"""The journal of a build: one line a drawing, kept or refused, from which an interrupted build resumes.

Lines are `path<TAB>outcome`, where the outcome is `shard NAME` or `refused: REASON`. They are appended once the
shard that they lead up to has its name, so that the journal never runs ahead of the shards.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from hdm_lightning.datasets.writer import require_no_shards
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import no_follow

NAME = "drawings.tsv"


class Journal:
    """Reads and continues the journal of a folder.

    Args:
        folder: the folder of shards.
        options: what shapes the build; a journal written with other options is refused.

    Raises:
        UserError: when the folder holds a build with other options, or shards without a journal.
    """

    def __init__(self, folder: Path, options: Mapping[str, object]) -> None:
        self.path = folder / NAME
        self.outcomes: dict[str, str] = {}
        header = f"# {json.dumps(dict(options), sort_keys=True)}"
        lines = self._whole_lines()
        if not lines:
            require_no_shards(folder)
            self._append([header])
            return
        if lines[0] != header:
            raise UserError(
                f"the folder holds a build with other options: {lines[0]}",
                where=str(self.path),
                hint="name another folder, or delete this one",
            )
        self.outcomes = dict(line.split("\t", 1) for line in lines[1:])

    def shards(self) -> list[str]:
        """Return the names of the shards written so far, in their order."""
        kept = (outcome.split(" ", 1)[1] for outcome in self.outcomes.values() if outcome.startswith("shard "))
        return list(dict.fromkeys(kept))

    def record(self, outcomes: Mapping[str, str]) -> None:
        """Append outcomes by path."""
        self.outcomes.update(outcomes)
        self._append([f"{path}\t{outcome}" for path, outcome in outcomes.items()])

    def _whole_lines(self) -> list[str]:
        """The lines of the file, which loses what a build that was killed left of its last one."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self.path, len(whole))
        return whole.decode().splitlines()

    def _append(self, lines: list[str]) -> None:
        with open(self.path, "a", encoding="utf-8", opener=no_follow) as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
