"""Report on an index in plain text: which samples are used, which are not, and why."""

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from hdm_lightning.data.index import Index
from hdm_lightning.data.shard_record import ShardRecord
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

MOST_REASONS = 6
MOST_NOTES = 50


def told(index: Index, place: str, files: Mapping[str, int]) -> Iterator[str]:
    """Yield a summary line, then a line per reason or kind of unused data, and one per damaged shard.

    `place` is the folder or address of the shards; `files` counts the skipped files beside them by kind.
    """
    reasons = left_out(index.shards)
    yield f"{place}: {index.samples} samples in {len(index.shards)} shards, {reasons.total()} left out"
    for reason, count in reasons.most_common(MOST_REASONS):
        yield f"  {count} left out: {in_one_line(reason)}"
    others: Counter[str] = Counter()
    for shard in index.shards:
        others.update(shard.others)
    for kind, count in others.most_common(MOST_REASONS):
        yield f"  {count} unused members: {in_one_line(kind)}"
    for kind, count in sorted(files.items()):
        yield f"  skipped: {count} {in_one_line(kind)}"
    damaged = [shard for shard in index.shards if shard.note]
    for shard in damaged[:MOST_NOTES]:
        yield f"  {in_one_line(shard.name)}: {in_one_line(shard.note)}"
    if len(damaged) > MOST_NOTES:
        yield f"  and {len(damaged) - MOST_NOTES} more damaged shards: hdm-shards verify {shlex.quote(place)}"


def left_out(shards: Iterable[ShardRecord]) -> Counter[str]:
    """Return the number of samples that are left out, by reason."""
    return Counter(reason for shard in shards for reason in shard.skip.values())


def require_samples(index: Index, place: str) -> None:
    """Raise UserError, with the most common reason, if no sample of an index can be used."""
    if not index.samples:
        raise no_samples(index.shards, place)


def no_samples(shards: Iterable[ShardRecord], place: str) -> UserError:
    """Return the error for shards whose index leaves out all samples."""
    shards = list(shards)
    reasons = left_out(shards)
    notes = [shard.note for shard in shards if shard.note]
    ((reason, _),) = reasons.most_common(1) or [(notes[0] if notes else "the shards are empty", 0)]
    what = f"none of {reasons.total()} samples can be used: {reason}"
    if "side by side" in reason:
        hint = "rebuild the archives with tar --sort=name"
    elif "dot" in reason or "only ." in reason:
        hint = "unpack the archives into a folder and run `hdm-shards build folder` on it, which accepts such names"
    elif "unpacks it" in reason:
        hint = "unpack the file, and run `hdm-shards index` again"
    else:
        hint = "each sample needs an image and a caption of the same name: see `hdm-shards build --help`"
    return UserError(what, where=place, hint=hint)
