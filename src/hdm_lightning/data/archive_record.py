"""Build the index record of one archive: its samples, the locations of their members, and what can never be used."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from hdm_lightning.data.decode import upright_size
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.image_headers import HEAD_BYTES, foreign_kind
from hdm_lightning.data.latent_sets import unpack_latent
from hdm_lightning.data.sample_table import IMAGE_EXTENSIONS, LATENT, TEXT_EXTENSIONS, form_of
from hdm_lightning.data.shard_record import ShardRecord, columns_of
from hdm_lightning.data.tar import BLOCK, Gap, Member, ReadAt, is_unsafe, split_name, walk

MOST_NOTES = 3
MOST_KINDS = 20
USED = (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS, LATENT)
"""Extensions of members that a sample may need."""

MAX_SAMPLE_BYTES = 320 << 20
"""Maximum size of all members of a sample, which are read together."""

APART = "members not side by side (rebuild the archive with tar --sort=name)"


class _Group(NamedTuple):
    """The members of one sample, in order, and its faults, if any."""

    key: str
    start: int
    members: dict[str, Member]
    faults: list[str]


def scanned(name: str, digest: str, size: int, read: ReadAt) -> ShardRecord:
    """Return the record of an archive of `size` bytes with the SHA-256 `digest`."""
    groups, end, notes, others = _grouped(read, size)
    starts = [group.start for group in groups] + [end]
    skip, shapes = _examined(read, groups, starts)
    forms = [
        form_of(read, group.key, start, end, group.members)
        for group, (start, end) in zip(groups, pairwise(starts), strict=True)
    ]
    if not groups and (kind := foreign_kind(read(0, HEAD_BYTES))):
        notes = [f"not a tar archive but {kind}"]
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
    """Return the samples of an archive (with faults for those next to a gap, which may lack members), the end of the
    last one, notes on damage, and the number of unused members by kind."""
    groups: list[_Group] = []
    others: Counter[str] = Counter()
    end, notes, torn = 0, [], False
    for found in walk(read, size, lambda kind: others.update([kind])):
        if isinstance(found, Gap):
            torn = torn or found.torn
            passed = "" if found.end == size else f": bytes {found.start} to {found.end} were passed over"
            notes.append(found.reason + passed)
            if found.torn and groups:
                kind = "last sample of a truncated archive" if found.end == size else "next to damage in the archive"
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
            groups[-1].faults.append("next to damage in the archive")
            torn = False
    return groups, end, notes, others


def _kind_of_member(extension: str) -> str:
    """Return the kind under which an unused member is counted."""
    last = extension.rpartition(".")[2]
    if last != extension and last in USED:
        return f"with .{last} after a further dot of their names, which are split at the first"
    return f".{extension[:20]}"


def _examined(
    read: ReadAt, groups: Sequence[_Group], starts: Sequence[int]
) -> tuple[dict[int, str], list[tuple[int, int]]]:
    """Return which samples are left out and why, and height and width of each, 0 if unknown."""
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
    """Return whether a group has exactly the image or text that an earlier group of the same key lacks."""
    brought = _parts(later)
    return bool(brought) and brought == {"image", "text"} - _parts(first)


def _parts(group: _Group) -> set[str]:
    return {"text" if extension in TEXT_EXTENSIONS else "image" for extension in group.members if extension in USED}


def _image_shape(read: ReadAt, group: _Group) -> tuple[int, int]:
    if (latent := group.members.get(LATENT)) is not None:
        return unpack_latent(read(latent.data, latent.size))[0]
    for extension in IMAGE_EXTENSIONS:
        if (member := group.members.get(extension)) is not None:
            return upright_size(read(member.data, member.size))
    raise SampleFault(_no_image(group))


def _no_image(group: _Group) -> str:
    extensions = sorted(group.members)
    behind = [each for each in extensions if each.rpartition(".")[2] in IMAGE_EXTENSIONS]
    if behind:
        return f"no image: .{behind[0][:40]} is not an image extension, as names are split at their first dot"
    return f"no image: only {', '.join(f'.{each[:20]}' for each in extensions[:4])}"
