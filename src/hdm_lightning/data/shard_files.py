"""Find the archives below a folder, and other files there that may have been meant as archives."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hdm_lightning.errors import UserError

PACKED = {".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tar.xz": "unxz", ".tar.zst": "unzstd"}
"""Endings of compressed archives, and the commands that unpack them."""


@dataclass
class ShardFiles:
    """The archives found below a folder.

    Attributes:
        names: paths of archives, relative to the folder, sorted.
        others: number of skipped files and folders that look like archives or may contain some, by kind.
    """

    names: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def told(self) -> str:
        """Return the others in one line, empty if there are none."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.others.items()))


def is_shard(name: str) -> bool:
    """Return whether a name or address is that of an archive."""
    return name.lower().endswith(".tar")


def find_shards(folder: Path, *, follow_links: bool = False) -> ShardFiles:
    """Find the archives below a folder, each folder once; links to folders are followed on request."""
    found = ShardFiles()
    for entry, name in _entries(folder, follow_links, found.others):
        if entry.name.startswith("."):
            found.others["hidden .tar"] += is_shard(entry.name)
        elif is_shard(entry.name):
            regular = entry.is_file()
            found.names += [name] * regular
            found.others[".tar that is not a file"] += not regular
        elif packed := next((ending for ending in PACKED if entry.name.lower().endswith(ending)), None):
            found.others[f"{packed} (unpack first)"] += 1
    found.names.sort()
    found.others = +found.others
    return found


def _entries(folder: Path, follow_links: bool, others: Counter[str]) -> Iterator[tuple["os.DirEntry[str]", str]]:
    """Yield the files below a folder with their relative paths; count the folders skipped in `others`."""
    waiting, known = [(folder, "")], {_identity(folder)}
    while waiting:
        place, prefix = waiting.pop()
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError:
            others["folders that cannot be read"] += 1
            continue
        for entry in entries:
            if not entry.is_dir():
                yield entry, prefix + entry.name
            elif entry.is_symlink() and not follow_links:
                others["links to folders, not followed (see --follow-links)"] += 1
            elif (identity := _identity(Path(entry.path))) not in known:
                known.add(identity)
                waiting.append((Path(entry.path), f"{prefix}{entry.name}/"))


def _identity(folder: Path) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino


def no_shards(folder: Path) -> UserError:
    """Return the error for a folder in which no archive was found."""
    others = find_shards(folder).told() if folder.is_dir() else ""
    what = "there are no shards (.tar) in this folder" + (f", but {others}" if others else "")
    if packed := [ending for ending in PACKED if f" {ending} " in f" {others}"]:
        place = shlex.quote(str(folder))
        hint = "unpack them: " + "; ".join(f"{PACKED[ending]} {place}/*{ending}" for ending in packed)
    elif "links" in others:
        hint = f"hdm-shards index --follow-links {shlex.quote(str(folder))}"
    else:
        hint = "name the folder that contains the shards; `hdm-shards build --help` shows how to make some"
    return UserError(what, where=str(folder), hint=hint)
