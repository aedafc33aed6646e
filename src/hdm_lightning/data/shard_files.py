"""The archives below a folder, and what else lies there that was perhaps meant to be one."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hdm_lightning.errors import UserError

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass
class ShardFiles:
    """What lies below a folder.

    Attributes:
        names: paths of archives, relative to the folder, sorted.
        others: how many files and folders were passed over that look like archives or may hold some, by what they are.
    """

    names: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def told(self) -> str:
        """The others in one line, empty where there are none."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.others.items()))


def is_shard(name: str) -> bool:
    """Whether a name or an address is that of an archive."""
    return name.lower().endswith(".tar")


def find_shards(folder: Path, *, follow_links: bool = False) -> ShardFiles:
    """The archives below a folder; links to folders are followed where asked for, each folder once."""
    found = ShardFiles()
    for entry, name in _entries(folder, follow_links, found.others):
        if entry.name.startswith("."):
            found.others["hidden .tar"] += is_shard(entry.name)
        elif is_shard(entry.name):
            regular = entry.is_file()
            found.names += [name] * regular
            found.others[".tar that is no file"] += not regular
        elif packed := next((ending for ending in PACKED if entry.name.lower().endswith(ending)), None):
            found.others[f"{packed} (to be unpacked first)"] += 1
    found.names.sort()
    found.others = +found.others
    return found


def _entries(folder: Path, follow_links: bool, others: Counter[str]) -> Iterator[tuple["os.DirEntry[str]", str]]:
    """The files below a folder with their paths relative to it; says which folders were not looked into."""
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
                others["links to folders, not followed (--follow-links takes them)"] += 1
            elif (identity := _identity(Path(entry.path))) not in known:
                known.add(identity)
                waiting.append((Path(entry.path), f"{prefix}{entry.name}/"))


def _identity(folder: Path) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino


def no_shards(folder: Path) -> UserError:
    """What to say of a folder in which no archive was found."""
    others = find_shards(folder).told() if folder.is_dir() else ""
    what = "there are no shards (.tar) in this folder" + (f", but {others}" if others else "")
    if ".tar.gz" in others:
        hint = f"unpack them: gunzip {shlex.quote(str(folder))}/*.gz"
    elif "links" in others:
        hint = f"hdm-shards index --follow-links {shlex.quote(str(folder))}"
    else:
        hint = "give the folder that holds the shards; `hdm-shards build --help` tells how to make some"
    return UserError(what, where=str(folder), hint=hint)
