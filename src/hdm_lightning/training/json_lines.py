"""Files of one JSON object a line that survive a crash: whole lines are kept, a line cut short is passed over."""

import json
import os
from pathlib import Path
from typing import Any

from hdm_lightning.whole_files import disk_full_error, is_disk_full, is_link_error, link_error, no_follow


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Write one line and sync it; what a crash cut short before it stays a line of its own.

    Raises:
        UserError: when the disk is full, or the file is a symbolic link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "a+b", opener=no_follow) as file:
            if file.tell() and not _ends_a_line(path):
                file.write(b"\n")
            file.write(json.dumps(values).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(path) from error
        if is_link_error(error):
            raise link_error(path) from error
        raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file, none where there is no file."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # the line a crash cut short
            continue
    return lines


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
