"""The folders that the page was started with, and what in them it may show: names on the page, paths on the server.

The page sends names back. A name that was not found here is refused, and no path is ever made from what it sends.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from hdm_lightning.encoders.pretrained import is_local_path
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

T = TypeVar("T")
DEPTH = 4
"""Levels of folders below a named one that are searched for runs; the runs of a sweep are two levels down."""
_OF_A_RUN = ("ledger.jsonl", "run.lock", "final")
_INSIDE_A_RUN = ("checkpoints", "samples", "tensorboard", "final")


def find_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the runs in and below some folders, by their paths as named; links are not followed."""
    return {in_one_line(place): place for folder in folders for place in _below(folder, DEPTH) if is_run(place)}


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (folder / "config.yaml").is_file() and any((folder / name).exists() for name in _OF_A_RUN)


def newest(runs: Mapping[str, Path]) -> str:
    """The name of the run, of one or more, whose files were written last."""
    return max(runs, key=lambda name: _written(runs[name]))


def _written(run: Path) -> float:
    times = [0.0]
    for name in ("config.yaml", *_OF_A_RUN):
        with suppress(OSError):  # not there, or not any more
            times.append((run / name).lstat().st_mtime)
    return max(times)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth == 0 or is_run(folder) or not folder.is_dir():
        return
    try:
        inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in inner:
        if name not in _INSIDE_A_RUN and not name.startswith("."):
            yield from _below(folder / name, depth - 1)


def chosen(known: Mapping[str, T], name: object, what: str) -> T:
    """Return what a name sent by the page stands for.

    Raises:
        UserError: the page did not offer the name.
    """
    if isinstance(name, str) and name in known:
        return known[name]
    if name in (None, ""):
        raise UserError("is not chosen", where=what, hint=f"choose one of the {len(known)} in the list")
    shown = in_one_line(name)[:80]
    hint = "choose one from the list, or name it when starting hdm-app"
    raise UserError(f"{shown!r} is not offered by this page", where=what, hint=hint)


def inside(folder: Path, path: Path) -> Path:
    """Return a path below a folder unchanged.

    Raises:
        UserError: it is a link that leads out of the folder.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        what = f"leads out of {folder}"
        raise UserError(what, where=str(path), hint="start hdm-app with the folder that it leads to")
    return path


def require_models(names: Sequence[str], option: str) -> None:
    """Raise UserError if a named model neither exists here nor has the form OWNER/NAME of the Hub."""
    for name in names:
        if not Path(name).exists() and (is_local_path(name) or "/" not in name):
            hint = "name a run, a model folder, a file, or OWNER/NAME on the Hub"
            raise UserError(f"there is no {name}", where=option, hint=hint)


def require_folders(folders: Sequence[Path], option: str) -> None:
    """Raise UserError if a named folder does not exist."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder", where=option, hint="name existing folders")
