"""Read whole shards to index them.

Indexing records sizes, checksums, the locations of samples and their members, and what can never be used. It resumes
where an earlier call was interrupted: each shard that was read adds a line to a file beside the index, which is
deleted when the index is written.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from hdm_lightning.data.archive_record import scanned
from hdm_lightning.data.index import ENCODE_ON, INDEX_NAME, LATENTS_NAME, Index, load_index, same_time, write_index
from hdm_lightning.data.latent_sets import LatentFormat
from hdm_lightning.data.parallel import ordered_map
from hdm_lightning.data.sample_table import LATENT
from hdm_lightning.data.shard_bytes import Version, read_range
from hdm_lightning.data.shard_files import find_shards, is_shard, no_shards
from hdm_lightning.data.shard_record import ShardRecord, as_entry, from_entry
from hdm_lightning.data.source_shards import expanded
from hdm_lightning.errors import UserError
from hdm_lightning.json_files import parse_object
from hdm_lightning.whole_files import make_folder, read_lines, replacing

PART_NAME = ".index-part.jsonl"
FETCHED_BYTES = 64 << 20
MOST_SHARD_BYTES = 64 << 30
"""Maximum size of a remote shard that is indexed; no more is fetched, whatever a server sends."""
Progress = Callable[[ShardRecord], None]


def index_shards(
    folder: str | os.PathLike[str],
    *,
    jobs: int = 1,
    new_only: bool = False,
    names: Sequence[str] | None = None,
    follow_links: bool = False,
    times: bool = True,
    progress: Progress | None = None,
) -> Index:
    """Read every `*.tar` below a folder and write its `index.json`; resumes where an earlier call was interrupted.

    Args:
        folder: a local folder.
        jobs: number of processes that read in parallel.
        new_only: keep the present index's records of shards whose size and modification time are the same.
        names: the shards below the folder, in the order of the index; None for all, sorted by name.
        follow_links: also look into folders that are links; each folder once.
        times: record when each shard was last modified; builders do not, so that equal builds have equal indices.
        progress: called after each shard.

    Raises:
        UserError: the folder is missing or has no shards, or a shard cannot be read.
    """
    root = Path(folder)
    require_one_set(root)
    if not root.is_dir():
        raise UserError("there is no such folder", where=str(root), hint="name the folder that contains the shards")
    if names is None:
        names = find_shards(root, follow_links=follow_links).names
    if not names:
        raise no_shards(root)
    latents = _latents_in(root, len(names))
    states = {name: _state(root / name) for name in names}
    known = _unchanged(root) if new_only else {}
    unread = {name: name for name in names if name not in known}
    known |= _scan_all(unread, partial(scan_shard, root), root / PART_NAME, states, jobs, progress)
    records = (known[name] for name in names)
    index = Index(str(root), tuple(each if times else replace(each, changed=0) for each in records), latents)
    write_index(index, root / INDEX_NAME)
    (root / PART_NAME).unlink()
    return index


def note_scanned(root: Path, record: ShardRecord) -> None:
    """Record a shard that was just written, so that `index_shards` does not read it again."""
    with (root / PART_NAME).open("a", encoding="utf-8") as handle:
        _note(handle, record, _state(root / record.name))


def require_one_set(root: Path) -> None:
    """Raise UserError if a folder contains sets of latents, each with its own index."""
    sets = sorted(file.parent.name for file in root.glob(f"*/{LATENTS_NAME}"))
    if sets:
        what = f"contains sets of latents ({', '.join(sets)}), each with its own index"
        raise UserError(what, where=str(root), hint=f"name one of them, such as {root / sets[0]}")


def _latents_in(root: Path, shards: int) -> LatentFormat | None:
    """Return the format of the latents in a folder of `shards` shards; None for images."""
    file = root / LATENTS_NAME
    if not file.is_file():
        return None
    try:
        written = parse_object(file.read_bytes())
        latents, wanted = LatentFormat.from_json(written), int(written["shards"])
    except (ValueError, KeyError, TypeError) as error:
        hint = "run the `hdm-shards encode` that made the set again, or delete the file if the shards contain images"
        raise UserError(f"is not a description of latents ({error!r})", where=str(file), hint=hint) from error
    if shards < wanted:
        raise UserError(f"only {shards} of {wanted} shards are encoded", where=str(root), hint=ENCODE_ON)
    return latents


def index_remote(patterns: Sequence[str], out: str | Path, *, jobs: int = 1, progress: Progress | None = None) -> Index:
    """Index remote shards into a local file, to be set as `index` of their source.

    Each shard is fetched once, read, and deleted.

    Args:
        patterns: addresses of shards (`…/0000.tar`) or brace patterns of them, all in one folder.
        out: file to write the index to; upload it next to the shards to have it found there.
        jobs, progress: as for `index_shards`.

    Raises:
        UserError: an address is not that of a shard, or cannot be read.
    """
    urls = list(dict.fromkeys(url for pattern in patterns for url in expanded(pattern)))
    folder, out = _common_folder(urls, patterns), Path(out)
    make_folder(out.parent)
    digest = hashlib.sha256(folder.encode()).hexdigest()[:8]
    part = out.with_name(f".{out.stem}-{digest}-part.jsonl")
    known = _scan_all({_name(url): url for url in urls}, _scan_remote, part, {}, jobs, progress)
    index = Index(folder, tuple(known[_name(url)] for url in urls))
    if any(extension == LATENT for record in index.shards for each in record.layouts for extension, _ in each.members):
        hint = f"upload the {INDEX_NAME} that `hdm-shards encode` wrote next to them"
        raise UserError("these shards contain latents, but do not name the autoencoder", where=folder, hint=hint)
    write_index(index, out)
    part.unlink()
    return index


def _scan_all(
    shards: Mapping[str, str],
    scan: Callable[[str], ShardRecord],
    part: Path,
    states: Mapping[str, list[int]],
    jobs: int,
    progress: Progress | None,
) -> dict[str, ShardRecord]:
    """Return the records of shards by name, from `scan(shard)` or from what an interrupted call has left in `part`.

    Each new record appends one line to that file, so writing stays linear in the number of shards.
    """
    known = {name: record for name, record in _read_part(part, states).items() if name in shards}
    missing = [name for name in shards if name not in known]
    found = ordered_map(scan, (shards[name] for name in missing), processes=min(jobs, len(missing)))
    with part.open("a", encoding="utf-8") as handle:
        for name, record in zip(missing, found, strict=True):
            if progress is not None:
                progress(record)
            known[name] = record
            _note(handle, record, states.get(name))
    return known


def _note(handle: IO[str], record: ShardRecord, state: list[int] | None) -> None:
    handle.write(json.dumps({**as_entry(record), "state": state}) + "\n")
    handle.flush()


def _read_part(part: Path, states: Mapping[str, list[int]]) -> dict[str, ShardRecord]:
    """Return the records that an interrupted call has left, of shards that have not changed since."""
    found = {}
    for entry in read_lines(part):
        try:
            record = from_entry(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged
        if entry.get("state") == states.get(record.name):
            found[record.name] = record
    return found


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _unchanged(root: Path) -> dict[str, ShardRecord]:
    """Return the index's records of shards that have not changed since; none if the index cannot be read."""
    try:
        index, written = load_index(root), (root / INDEX_NAME).stat().st_mtime
    except UserError:
        return {}
    found = {}
    for record in index.shards:
        try:
            state = (root / record.name).stat()
        except FileNotFoundError:
            continue
        same = same_time(record.changed, state.st_mtime_ns) if record.changed else state.st_mtime < written
        if state.st_size == record.bytes and same:
            found[record.name] = record
    return found


def _common_folder(urls: Sequence[str], patterns: Sequence[str]) -> str:
    folders = {url.rpartition("/")[0] for url in urls}
    if len(folders) != 1 or not all(is_shard(url) for url in urls):
        raise UserError(
            "an index is for remote shards (.tar) in a single folder",
            where=", ".join(patterns),
            hint="use a pattern such as https://host/folder/{0000..0099}.tar",
        )
    return folders.pop()


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _scan_remote(url: str) -> ShardRecord:
    name = _name(url)
    with tempfile.TemporaryDirectory() as folder:
        versions: set[Version] = set()
        with replacing(Path(folder) / name) as copy, copy.open("wb") as handle:
            for part in _parts(url, versions):
                handle.write(part)
        tags = {version.tag for version in versions}
        # Copies of a file on several servers may have different tags: then none is recorded.
        return replace(scan_shard(Path(folder), name), changed=0, tag=tags.pop() if len(tags) == 1 else "")


def _parts(url: str, versions: set[Version]) -> Iterator[bytes]:
    """Yield the bytes of a remote shard in parts. Raises UserError: it cannot be read, or is too large."""
    start = 0
    while start <= MOST_SHARD_BYTES:
        try:
            part = read_range(url, start, start + FETCHED_BYTES, versions.add)
        except OSError as error:
            raise UserError(str(error), where=url, hint="check the address and the network") from error
        yield part
        start += len(part)
        if len(part) < FETCHED_BYTES:
            return
    what = f"has more than {MOST_SHARD_BYTES >> 30} GiB, which is too much for a shard"
    raise UserError(what, where=url, hint="check what the server sends; index such a shard where it is a local file")


def scan_shard(root: Path, name: str) -> ShardRecord:
    """Return the index record of one local shard. Raises UserError: it cannot be read."""
    path = root / name
    try:
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            state = os.fstat(handle.fileno())
            record = scanned(name, digest, state.st_size, lambda start, count: os.pread(handle.fileno(), count, start))
            return replace(record, changed=state.st_mtime_ns)
    except Exception as error:
        hint = "check the file, or move it out of the folder to index the others"
        raise UserError(
            f"the shard cannot be read ({type(error).__name__}: {error})", where=str(path), hint=hint
        ) from error
