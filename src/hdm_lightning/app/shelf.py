"""The folders that the page was started with, and what in them may be looked at: names on the page, paths here.

The page sends names back, and a name that was not found here means nothing: no path is ever made of what it sends.
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
"""Folders below a named one in which runs are looked for; sweeps lie at two."""
MOST_RUNS = 2000
_OF_A_RUN = ("ledger.jsonl", "run.lock", "final")
_INSIDE_A_RUN = ("checkpoints", "samples", "tensorboard", "final")


def find_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """The runs in and below some folders, by their paths as named; links are not followed."""
    found: dict[str, Path] = {}
    for folder in folders:
        for place in _below(folder, DEPTH):
            if len(found) < MOST_RUNS and is_run(place):
                found[in_one_line(place)] = place
    return found


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
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
    """What a name of the page means.

    Raises:
        UserError: nothing, since the page did not offer it.
    """
    if isinstance(name, str) and name in known:
        return known[name]
    if name in (None, ""):
        raise UserError("is not chosen", where=what, hint=f"choose one of the {len(known)} that there are")
    shown = in_one_line(name)[:80]
    hint = "choose one of the list; what may be looked at is named when hdm-app is started"
    raise UserError(f"{shown!r} is none that this page has", where=what, hint=hint)


def inside(folder: Path, path: Path) -> Path:
    """A path below a folder as it is.

    Raises:
        UserError: it is a link that leads out of the folder.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        what = f"leads out of {folder}"
        raise UserError(what, where=str(path), hint="start hdm-app with the folder that it leads to")
    return path


def require_models(names: Sequence[str], option: str) -> None:
    """Raise UserError where a model that was named is neither here nor a hub's OWNER/NAME."""
    for name in names:
        if not Path(name).exists() and (is_local_path(name) or "/" not in name):
            hint = "name a run, a model's folder, a file, or a hub's OWNER/NAME"
            raise UserError(f"there is no {name}", where=option, hint=hint)


def require_folders(folders: Sequence[Path], option: str) -> None:
    """Raise UserError where a folder that was named is none."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder", where=option, hint="name folders that there are")
