"""What the shards of a folder hold: `index.json`, written beside them.

The index says for each shard how many usable samples it has, its size and SHA-256, and where each sample begins, so
that any sample of any shard is one read of a known range. Samples that can never be used (no image, unsafe names, a
key that stands twice, or found bad by `hdm-shards verify`) are named in `skip` and belong to no plan.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from hdm_lightning.data.records import Index, ShardRecord
from hdm_lightning.data.scanning import scan_shards
from hdm_lightning.data.storage import is_local, read_whole
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import replacing

__all__ = ["INDEX_NAME", "Index", "ShardRecord", "index_shards", "load_index", "write_index"]

FORMAT = 1
INDEX_NAME = "index.json"
PART_NAME = ".index-part.json"
PART_EVERY = 20


def index_shards(
    folder: str | os.PathLike[str],
    *,
    jobs: int = 1,
    new_only: bool = False,
    progress: Callable[[ShardRecord], None] | None = None,
) -> Index:
    """Read every `*.tar` below a folder and write its `index.json`; goes on where an earlier call was interrupted.

    Args:
        folder: a local folder.
        jobs: processes that read side by side.
        new_only: keep what the present index says of shards that have the same size and are not younger than it.
        progress: called after each shard.

    Raises:
        UserError: the folder is missing or has no shard.
    """
    root = Path(folder)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.tar")) if root.is_dir() else []
    if not names:
        raise UserError("there is no .tar file here", where=str(root), hint="give the folder that holds the shards")
    part = root / PART_NAME
    known = {**(_known(root, root / INDEX_NAME) if new_only else {}), **_known(root, part)}
    missing = [name for name in names if name not in known]
    for done, record in enumerate(scan_shards(root, missing, jobs=jobs, progress=progress), start=1):
        known[record.name] = record
        if done % PART_EVERY == 0:
            write_index(Index(str(root), tuple(known.values())), part)
    index = Index(str(root), tuple(known[name] for name in names))
    write_index(index, root / INDEX_NAME)
    part.unlink(missing_ok=True)
    return index


def _known(root: Path, file: Path) -> dict[str, ShardRecord]:
    """The records of a file whose shards have not changed since it was written."""
    if not file.is_file():
        return {}
    written = file.stat().st_mtime
    found = {}
    for record in load_index(file).shards:
        try:
            state = (root / record.name).stat()
        except FileNotFoundError:
            continue
        if state.st_size == record.bytes and state.st_mtime < written:
            found[record.name] = record
    return found


def write_index(index: Index, path: Path) -> None:
    """Write an index so that a reader sees the old one or the new one, never a part."""
    document = {"format": FORMAT, "samples": index.samples, "shards": [asdict(shard) for shard in index.shards]}
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        json.dump(document, handle, indent=1)


def load_index(location: str | os.PathLike[str]) -> Index:
    """The index of a folder, local or remote, or an index file itself (a name that ends in .json).

    Raises:
        UserError: there is no index, or it cannot be read.
    """
    text = os.fspath(location)
    file = text if text.endswith(".json") else f"{text.rstrip('/')}/{INDEX_NAME}"
    try:
        raw = read_whole(file)
    except OSError as error:
        raise _no_index(text, file, error) from error
    return _parse(raw, file)


def _no_index(location: str, file: str, error: OSError) -> UserError:
    make = "`hdm-shards build --help` tells how to make some"
    if is_local(location) and not Path(location).exists():
        return UserError("there is no such folder", where=location, hint=f"give the folder of your shards; {make}")
    if Path(location).is_dir() and not any(Path(location).glob("*.tar")):
        return UserError("there are no shards (.tar) in this folder", where=location, hint=make)
    if not isinstance(error, FileNotFoundError):
        hint = "check the address, and whether you may read it"
        return UserError(f"the index of the shards cannot be read ({error})", where=file, hint=hint)
    return UserError("there is no index of the shards", where=file, hint=_index_command(location))


def _index_command(location: str) -> str:
    """What makes the index that is missing at a location."""
    if location.endswith(".json"):
        return "check `index` of the source"
    if is_local(location):
        return f"run `hdm-shards index {location}`"
    return (
        f"write one with `hdm-shards index '{location.rstrip('/')}/{{0000..0099}}.tar' --out index.json` and upload it "
        "beside the shards, or name it as `index` of the source"
    )


def _parse(raw: bytes, file: str) -> Index:
    try:
        document = json.loads(raw)
        if document["format"] != FORMAT:
            raise UserError(
                f"index format {document['format']} was written by another version; this one reads {FORMAT}",
                where=file,
                hint="run `hdm-shards index` again",
            )
        shards = tuple(_record(entry) for entry in document["shards"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        hint = "run `hdm-shards index` again"
        raise UserError(f"the index cannot be read ({error!r})", where=file, hint=hint) from error
    return Index(file.rpartition("/")[0] or ".", shards)


def _record(entry: Mapping[str, object]) -> ShardRecord:
    known = {name: entry[name] for name in ShardRecord.__dataclass_fields__ if name in entry}
    skip = entry.get("skip") or {}
    known["skip"] = {int(ordinal): str(reason) for ordinal, reason in skip.items()}  # type: ignore[attr-defined]
    return ShardRecord(**known)  # type: ignore[arg-type]
