"""Reading whole shards to index them.

Indexing notes sizes, checksums, where samples and their members lie, and what can never be used. It resumes where an
earlier call was interrupted: each shard that was read adds a line to a file beside the index, which goes when the
index is written.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

from hdm_lightning.data.decode import upright_size
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.image_kinds import HEAD_BYTES, foreign_kind
from hdm_lightning.data.index import (
    ENCODE_ON,
    INDEX_NAME,
    LATENTS_NAME,
    Index,
    ShardRecord,
    as_entry,
    columns_of,
    from_entry,
    load_index,
    write_index,
)
from hdm_lightning.data.latent_sets import LatentFormat, unpack_latent
from hdm_lightning.data.parallel import ordered_map
from hdm_lightning.data.shard_bytes import read_range
from hdm_lightning.data.shard_files import find_shards, is_shard, no_shards
from hdm_lightning.data.source_shards import expanded
from hdm_lightning.data.tar import (
    BLOCK,
    IMAGE_EXTENSIONS,
    LATENT,
    TEXT_EXTENSIONS,
    Gap,
    Member,
    ReadAt,
    form_of,
    is_unsafe,
    split_name,
    walk,
)
from hdm_lightning.errors import UserError

PART_NAME = ".index-part.jsonl"
FETCHED_BYTES = 64 << 20
MOST_NOTES = 3
MOST_KINDS = 20
USED = (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS, LATENT)
"""Extensions of members that a sample may need."""

MAX_SAMPLE_BYTES = 320 << 20
"""Of all members of a sample, which are read together."""

APART = "members not side by side (make the archive with tar --sort=name)"

Progress = Callable[[ShardRecord], None]


def index_shards(
    folder: str | os.PathLike[str],
    *,
    jobs: int = 1,
    new_only: bool = False,
    names: Sequence[str] | None = None,
    follow_links: bool = False,
    progress: Progress | None = None,
) -> Index:
    """Read every `*.tar` below a folder and write its `index.json`; resumes where an earlier call was interrupted.

    Args:
        folder: a local folder.
        jobs: processes that read side by side.
        new_only: keep what the present index says of shards that have the same size and are not younger than it.
        names: the shards below the folder in the order that the index is to have; None is all by name.
        follow_links: look into folders that are links, too; each folder once.
        progress: called after each shard.

    Raises:
        UserError: the folder is missing, has no shard, or one cannot be read.
    """
    root = Path(folder)
    require_one_set(root)
    if not root.is_dir():
        raise UserError("there is no such folder", where=str(root), hint="give the folder that holds the shards")
    if names is None:
        names = find_shards(root, follow_links=follow_links).names
    if not names:
        raise no_shards(root)
    latents = _latents_in(root, len(names))
    states = {name: _state(root / name) for name in names}
    known = _unchanged(root) if new_only else {}
    unread = {name: name for name in names if name not in known}
    known |= _scan_all(unread, partial(scan_shard, root), root / PART_NAME, states, jobs, progress)
    index = Index(str(root), tuple(known[name] for name in names), latents)
    write_index(index, root / INDEX_NAME)
    (root / PART_NAME).unlink()
    return index


def note_scanned(root: Path, record: ShardRecord) -> None:
    """Spare `index_shards` the reading of a shard that was just written."""
    with (root / PART_NAME).open("a", encoding="utf-8") as handle:
        _note(handle, record, _state(root / record.name))


def require_one_set(root: Path) -> None:
    """Raise UserError where a folder holds sets of latents, each with an index of its own."""
    sets = sorted(file.parent.name for file in root.glob(f"*/{LATENTS_NAME}"))
    if sets:
        what = f"holds sets of latents ({', '.join(sets)}), each with an index of its own"
        raise UserError(what, where=str(root), hint=f"name one: {root / sets[0]}")


def _latents_in(root: Path, shards: int) -> LatentFormat | None:
    """What a folder's shards, of which there are so many, hold in the place of images."""
    file = root / LATENTS_NAME
    if not file.is_file():
        return None
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        latents, wanted = LatentFormat.from_json(written), int(written["shards"])
    except (ValueError, KeyError, TypeError) as error:
        hint = "run the `hdm-shards encode` again that made the set, or delete the file of a set of images"
        raise UserError(f"describes no latents ({error!r})", where=str(file), hint=hint) from error
    if shards < wanted:
        raise UserError(f"{shards} of {wanted} shards are encoded", where=str(root), hint=ENCODE_ON)
    return latents


def index_remote(patterns: Sequence[str], out: str | Path, *, jobs: int = 1, progress: Progress | None = None) -> Index:
    """Index remote shards into a local file, to be named as `index` of their source.

    Each shard is fetched once, read, and forgotten.

    Args:
        patterns: addresses of shards (`…/0000.tar`) or brace patterns of them, all below one folder.
        out: where the index is written; upload it beside the shards to have it found there.
        jobs: processes that fetch and read side by side.
        progress: called after each shard.

    Raises:
        UserError: an address is no shard, or cannot be read.
    """
    urls = [url for pattern in patterns for url in expanded(pattern)]
    folder, out = _common_folder(urls, patterns), Path(out)
    digest = hashlib.sha256(folder.encode()).hexdigest()[:8]
    part = out.with_name(f".{out.stem}-{digest}-part.jsonl")
    known = _scan_all({_name(url): url for url in urls}, _scan_remote, part, {}, jobs, progress)
    index = Index(folder, tuple(known[_name(url)] for url in urls))
    if any(extension == LATENT for record in index.shards for each in record.layouts for extension, _ in each.members):
        hint = f"upload the {INDEX_NAME} beside them that `hdm-shards encode` wrote"
        raise UserError("these shards hold latents, which do not tell of which autoencoder", where=folder, hint=hint)
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
    """The records of shards by name, from `scan(shard)` or from what an interrupted call has left in `part`.

    Each record that is read adds its line to that file, so that writing stays linear in the shards.
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
    """The records that an interrupted call has left, of shards that have not changed since."""
    found = {}
    for line in part.read_text(encoding="utf-8").splitlines() if part.is_file() else []:
        try:
            entry: dict[str, Any] = json.loads(line)
            record = from_entry(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the last line of a call that was killed
        if entry.get("state") == states.get(record.name):
            found[record.name] = record
    return found


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _unchanged(root: Path) -> dict[str, ShardRecord]:
    """The records of the folder's index whose shards have not changed since; none of an index that cannot be read."""
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
        if state.st_size == record.bytes and state.st_mtime < written:
            found[record.name] = record
    return found


def _common_folder(urls: Sequence[str], patterns: Sequence[str]) -> str:
    folders = {url.rpartition("/")[0] for url in urls}
    if len(folders) != 1 or not all(is_shard(url) for url in urls):
        raise UserError(
            "an index takes in remote shards below one folder, each named by its address",
            where=", ".join(patterns),
            hint="give a pattern such as https://host/folder/{0000..0099}.tar",
        )
    return folders.pop()


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _scan_remote(url: str) -> ShardRecord:
    name = _name(url)
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / name).open("wb") as handle:
            try:
                while part := read_range(url, handle.tell(), handle.tell() + FETCHED_BYTES):
                    handle.write(part)
                    if len(part) < FETCHED_BYTES:
                        break
            except OSError as error:
                raise UserError(str(error), where=url, hint="check the address and the network") from error
        return scan_shard(Path(folder), name)


class _Group(NamedTuple):
    """The members of one sample, in order, and what is wrong with it, if anything."""

    key: str
    start: int
    members: dict[str, Member]
    faults: list[str]


def scan_shard(root: Path, name: str) -> ShardRecord:
    """Everything that an index says about one local shard.

    Raises:
        UserError: it cannot be read.
    """
    path = root / name
    try:
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            size = handle.seek(0, 2)
            return scanned(name, digest, size, lambda start, count: os.pread(handle.fileno(), count, start))
    except Exception as error:
        hint = "look at the file; without it, the others can be indexed"
        raise UserError(
            f"the shard cannot be read ({type(error).__name__}: {error})", where=str(path), hint=hint
        ) from error


def scanned(name: str, digest: str, size: int, read: ReadAt) -> ShardRecord:
    """The record of an archive of `size` bytes with a SHA-256."""
    groups, end, notes, others = _grouped(read, size)
    starts = [group.start for group in groups] + [end]
    skip, shapes = _examined(read, groups, starts)
    forms = [
        form_of(read, group.key, start, end, group.members)
        for group, (start, end) in zip(groups, pairwise(starts), strict=True)
    ]
    if not groups and (kind := foreign_kind(read(0, HEAD_BYTES))):
        notes = [f"no tar archive but {kind}"]
    more = len(notes) - MOST_NOTES
    notes = notes[:MOST_NOTES] + ([f"and {more} more places"] if more > 0 else [])
    return ShardRecord(
        name=name,
        samples=len(groups) - len(skip),
        bytes=size,
        sha256=digest,
        first_block=starts[0] // BLOCK,
        **columns_of(forms, shapes),
        skip=skip,
        note="; ".join(notes),
        others=dict(others.most_common(MOST_KINDS)),
    )


def _grouped(read: ReadAt, size: int) -> tuple[list[_Group], int, list[str], Counter[str]]:
    """The samples of an archive, those beside a gap that may lack members marked; where the last one ends; notes; and
    how many members there are that no sample needs, by kind."""
    groups: list[_Group] = []
    others: Counter[str] = Counter()
    end, notes, torn = 0, [], False
    for found in walk(read, size, lambda kind: others.update([kind])):
        if isinstance(found, Gap):
            torn = torn or found.torn
            passed = "" if found.end == size else f": bytes {found.start} to {found.end} were passed over"
            notes.append(found.reason + passed)
            if found.torn and groups:
                kind = "last sample of a truncated archive" if found.end == size else "beside damage in the archive"
                groups[-1].faults.append(kind)
            continue
        end = found.end
        named = split_name(found.name)
        if named is None:
            others["without an extension, or hidden"] += 1
            continue
        key, extension = named
        if extension not in USED:
            others[_kind_of_member(extension)] += 1
        if not groups or groups[-1].key != key or extension in groups[-1].members:
            groups.append(_Group(key, found.start, {}, []))
        groups[-1].members[extension] = found
        if is_unsafe(found.name):
            groups[-1].faults.insert(0, "unsafe member name")
        if torn:
            groups[-1].faults.append("beside damage in the archive")
            torn = False
    return groups, end, notes, others


def _kind_of_member(extension: str) -> str:
    """What is counted of a member that no sample needs."""
    last = extension.rpartition(".")[2]
    if last != extension and last in USED:
        return f"with .{last} behind a further dot of their names, which are cut at the first"
    return f".{extension[:20]}"


def _examined(
    read: ReadAt, groups: Sequence[_Group], starts: Sequence[int]
) -> tuple[dict[int, str], list[tuple[int, int]]]:
    """Which samples are left out and why, and height and width of each, 0 where unknown."""
    skip: dict[int, str] = {}
    shapes: list[tuple[int, int]] = []
    seen: dict[str, int] = {}
    for ordinal, group in enumerate(groups):
        faults = group.faults
        if (first := seen.setdefault(group.key, ordinal)) != ordinal:
            apart = _completes(group, groups[first])
            faults = [APART if apart else "duplicate key", *faults]
            if apart and not groups[first].faults:
                skip[first] = APART
        if starts[ordinal + 1] - group.start > MAX_SAMPLE_BYTES:
            faults = [*faults, "sample too large"]
        shape = (0, 0)
        if not faults:
            try:
                shape = _image_shape(read, group)
            except SampleFault as fault:
                faults = [str(fault)]
        shapes.append(shape)
        if faults:
            skip[ordinal] = faults[0]
    return skip, shapes


def _completes(later: _Group, first: _Group) -> bool:
    """Whether a group has just what an earlier one of its key lacks of an image and a text."""
    brought = _parts(later)
    return bool(brought) and brought == {"image", "text"} - _parts(first)


def _parts(group: _Group) -> set[str]:
    return {"text" if extension in TEXT_EXTENSIONS else "image" for extension in group.members if extension in USED}


def _image_shape(read: ReadAt, group: _Group) -> tuple[int, int]:
    if (latent := group.members.get(LATENT)) is not None:
        return unpack_latent(read(latent.data, latent.size))[0]
    for extension in IMAGE_EXTENSIONS:
        if extension in group.members:
            member = group.members[extension]
            return upright_size(read(member.data, member.size))
    raise SampleFault(_no_image(group))


def _no_image(group: _Group) -> str:
    extensions = sorted(group.members)
    behind = [each for each in extensions if each.rpartition(".")[2] in IMAGE_EXTENSIONS]
    if behind:
        return f"no image: .{behind[0][:40]} is no extension of one, as names are cut at their first dot"
    return f"no image: only {', '.join(f'.{each[:20]}' for each in extensions[:4])}"
