"""The index of a folder of shards: `index.json`, beside them, with a record of each shard.

The index lists each shard's number of usable samples, size and SHA-256, and where each sample and each of its members
begins, so any sample of any shard is one read of a known range. A large set has its columns in a separate file, see
`index_columns`. Samples that can never be used (no image, unsafe names, a duplicate key, or found bad by `hdm-shards
verify`) are listed in `skip` and left out of all plans.
"""

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from hdm_lightning.data.index_columns import map_columns, remove_other_columns, write_columns
from hdm_lightning.data.latent_sets import LatentFormat
from hdm_lightning.data.shard_bytes import is_local, read_whole
from hdm_lightning.data.shard_files import find_shards, no_shards
from hdm_lightning.data.shard_record import ShardRecord, as_entry, column_entries, entry_beside, from_entry, natural
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import replacing

FORMAT = 3
_READ = (2, 3)
INDEX_NAME = "index.json"
LATENTS_NAME = "latents.json"
"""File beside shards of latents, written before the first shard: the latent format that their index will have."""

ENCODE_ON = "run the same `hdm-shards encode` again; it resumes where it stopped"

MOST_BYTES = 8 << 30
"""Maximum size of an index, and of its columns file: 700 million samples have 6 GB."""

INLINE_BYTES = 16 << 20
"""Maximum size of columns kept in the index itself, so that sets of a few million samples have a single file."""

_SECOND = 1_000_000_000


@dataclass(frozen=True)
class Index:
    """The shards of one folder.

    Attributes:
        base: folder or address that the shards' names are relative to.
        shards: records in the order of the plan.
        latents: format of the latents that the samples have instead of images; None for images.
        resolutions: for a folder of sets of latents instead of shards: one set per resolution, each in `set_folder`.
    """

    base: str
    shards: tuple[ShardRecord, ...]
    latents: LatentFormat | None = None
    resolutions: tuple[int, ...] = ()

    @property
    def samples(self) -> int:
        """Number of usable samples in all shards."""
        return sum(shard.samples for shard in self.shards)


def set_folder(resolution: int) -> str:
    """Return the name of the subfolder with the latents of one resolution."""
    return f"{resolution}px"


def holds_latents(location: str, resolution: int) -> bool:
    """Return whether a local folder is, or contains, a set of latents at a resolution, without reading an index."""
    root = Path(location).expanduser()
    return is_local(location) and any((each / LATENTS_NAME).is_file() for each in (root, root / set_folder(resolution)))


def write_index(index: Index, path: Path) -> None:
    """Write an index atomically: a reader sees the old one or the new one, never a part."""
    more: dict[str, Any] = {} if index.latents is None else {"latents": index.latents.to_json()}
    if index.resolutions:
        more["resolutions"] = list(index.resolutions)
    columns = sum(len(column) for shard in index.shards for column in shard.columns())
    if columns > INLINE_BYTES:
        name = write_columns(lambda: (each for shard in index.shards for each in shard.columns()), path)
        more["columns"] = {"file": name, "bytes": columns}
    head = json.dumps({"format": FORMAT, "samples": index.samples, **more})[:-1]
    entry = entry_beside if "columns" in more else as_entry
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        handle.write(f'{head}, "shards": [')
        for number, shard in enumerate(index.shards):
            handle.write(",\n" if number else "\n")
            handle.write(json.dumps(entry(shard)))
        handle.write("\n]}\n")
    remove_other_columns(path, kept=more.get("columns", {}).get("file"))


def load_index(location: str | os.PathLike[str]) -> Index:
    """Load the index of a folder, local or remote, or an index file (a name that ends in .json).

    Raises:
        UserError: there is no index, or it cannot be read.
    """
    file = index_file(location)
    raw = _read(location, file)
    try:
        try:
            return _parsed(raw, file)
        except FileNotFoundError:
            # A writer has replaced the index and deleted the old columns: read the new index.
            return _parsed(_read(location, file), file)
    except _OtherFormat as error:
        what = f"the index has format {error} of another version; this version reads format {FORMAT}"
    except OSError as error:
        what = f"the columns of the index cannot be read ({error})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"the index cannot be read ({error!r})"
    folder, _, name = file.rpartition("/")
    if is_local(file) and name == INDEX_NAME:
        hint = f"rebuild it: hdm-shards index {shlex.quote(folder or '.')}"
    else:
        hint = "write one with `hdm-shards index SHARDS --out index.json`, and put it in place of this one"
    raise UserError(what, where=file, hint=hint)


class _OtherFormat(Exception):
    """The index has the format of another version."""


def _read(location: str | os.PathLike[str], file: str) -> bytes:
    try:
        return read_whole(file, MOST_BYTES)
    except OSError as error:
        raise _no_index(os.fspath(location), file, error) from error


def _parsed(raw: bytes, file: str) -> Index:
    document = json.loads(raw)
    if document["format"] not in _READ:
        raise _OtherFormat(document["format"])
    shards = tuple(_records(document, file))
    latents = document.get("latents")
    resolutions = tuple(natural(each, 1) for each in document.get("resolutions", ()))
    described = None if latents is None else LatentFormat.from_json(latents)
    return Index(file.rpartition("/")[0] or ".", shards, described, resolutions)


def index_file(location: str | os.PathLike[str]) -> str:
    """Return path or address of the index of a folder, or of an index file itself."""
    text = os.fspath(location)
    return text if text.endswith(".json") else f"{text.rstrip('/')}/{INDEX_NAME}"


def _no_index(location: str, file: str, error: OSError) -> UserError:
    make = "`hdm-shards build --help` shows how to make some"
    if is_local(location) and not Path(location).exists():
        where = "" if Path(location).is_absolute() else f" (relative paths start in {Path.cwd()})"
        hint = f"name the one with your shards{where}; {make}"
        return UserError("there is no such folder", where=location, hint=hint)
    if is_local(location) and any(Path(location).glob(f"**/{LATENTS_NAME}")):
        return UserError("not all images are encoded yet", where=location, hint=ENCODE_ON)
    if Path(location).is_dir() and not find_shards(Path(location)).names:
        return no_shards(Path(location))
    if not isinstance(error, FileNotFoundError):
        hint = "check the address and your access to it"
        return UserError(f"the index of the shards cannot be read ({error})", where=file, hint=hint)
    if location.endswith(".json"):
        hint = "check the `index` of the source"
    elif is_local(location):
        hint = f"run `hdm-shards index {shlex.quote(location)}`"
    else:
        pattern = f"{location.rstrip('/')}/{{0000..0099}}.tar"
        hint = f"write one with `hdm-shards index '{pattern}' --out index.json`, and upload it next to the shards or "
        hint += "set it as the `index` of the source"
    return UserError("there is no index of the shards", where=file, hint=hint)


def same_time(recorded_ns: int, changed_ns: int) -> bool:
    """Return whether a modification time matches a recorded one (0: unknown); some stores keep only seconds."""
    return recorded_ns in (0, changed_ns) or (
        changed_ns % _SECOND == 0 and changed_ns == recorded_ns // _SECOND * _SECOND
    )


def _records(document: Mapping[str, Any], file: str) -> Iterator[ShardRecord]:
    """Yield the records of an index, with their columns from the index or the file beside it."""
    entries, columns = document["shards"], document.get("columns")
    if columns is None:
        yield from map(from_entry, entries)
        return
    if (size := natural(columns["bytes"])) > MOST_BYTES:
        raise ValueError(f"it claims {size:,} bytes of columns")
    mapped, begin = map_columns(file, columns["file"], size), 0
    for entry in entries:
        ends = accumulate(map(natural, column_entries(entry)), initial=begin)
        cut = [mapped[start:end] for start, end in pairwise(ends)]
        begin += sum(map(len, cut))
        yield from_entry(entry, cut)
    if begin != len(mapped):
        raise ValueError(f"the shards have {begin} bytes of columns, but there are {len(mapped)}")
