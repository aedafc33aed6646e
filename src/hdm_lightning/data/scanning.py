"""Reading shards for their index: sizes, checksums, where samples begin, what can never be used."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.images import upright_size
from hdm_lightning.data.members import IMAGE_EXTENSIONS
from hdm_lightning.data.parallel import ordered_map
from hdm_lightning.data.records import ShardRecord, pack
from hdm_lightning.data.tar import BLOCK, Member, ReadAt, is_unsafe, members, split_name


@dataclass
class _Group:
    """The members of one sample."""

    key: str
    start: int
    members: dict[str, Member] = field(default_factory=dict)
    fault: str = ""


def scan_shards(
    root: Path, names: Sequence[str], *, jobs: int, progress: Callable[[ShardRecord], None] | None
) -> Iterator[ShardRecord]:
    """The records of shards, in the order of their names."""
    for record in ordered_map(partial(scan_shard, root), names, processes=min(jobs, len(names))):
        if progress is not None:
            progress(record)
        yield record


def scan_shard(root: Path, name: str) -> ShardRecord:
    """Everything that an index says about one local shard."""
    path = root / name
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        size = handle.seek(0, 2)

        def read(offset: int, count: int) -> bytes:
            handle.seek(offset)
            return handle.read(count)

        groups, end, note = _group(read, size)
        skip, shapes = _judge(read, groups, note)
    starts = [group.start for group in groups] + [end]
    blocks = [(after - before) // BLOCK for before, after in pairwise(starts)]
    return ShardRecord(
        name=name,
        samples=len(groups) - len(skip),
        bytes=size,
        sha256=digest,
        first_block=starts[0] // BLOCK,
        blocks=pack(blocks),
        height=pack([height for height, _ in shapes]),
        width=pack([width for _, width in shapes]),
        skip=skip,
        note=note,
    )


def _group(read: ReadAt, size: int) -> tuple[list[_Group], int, str]:
    """The samples of an archive, where the last one ends, and what is wrong with the archive as a whole."""
    groups: list[_Group] = []
    end, note = 0, ""
    try:
        for member in members(read, 0, size, whole=True):
            end = member.end
            named = split_name(member.name)
            if named is None:
                continue
            key, extension = named
            if not groups or groups[-1].key != key or extension in groups[-1].members:
                groups.append(_Group(key, member.start))
            groups[-1].members[extension] = member
            if is_unsafe(member.name):
                groups[-1].fault = "unsafe member name"
    except SampleFault as fault:
        note = str(fault)
    return groups, end, note


def _judge(read: ReadAt, groups: list[_Group], note: str) -> tuple[dict[int, str], list[tuple[int, int]]]:
    skip: dict[int, str] = {}
    shapes: list[tuple[int, int]] = []
    seen: set[str] = set()
    for ordinal, group in enumerate(groups):
        fault = "duplicate key" if group.key in seen else group.fault
        seen.add(group.key)
        shape = (0, 0)
        if not fault:
            try:
                shape = _image_shape(read, group)
            except SampleFault as found:
                fault = str(found)
        shapes.append(shape)
        if fault:
            skip[ordinal] = fault
    if note and groups:
        skip.setdefault(len(groups) - 1, "last sample of a truncated archive")
    return skip, shapes


def _image_shape(read: ReadAt, group: _Group) -> tuple[int, int]:
    for extension in IMAGE_EXTENSIONS:
        if extension in group.members:
            member = group.members[extension]
            return upright_size(read(member.data, member.size))
    raise SampleFault("no image")
