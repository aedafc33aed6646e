"""What an index says of its shards in words: what is used, what is not, and why."""

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
    """A line of what was found, one of each thing that is of no use, and one for each shard that is damaged.

    Args:
        index: of the shards.
        place: their folder or address.
        files: how many files beside them were passed over, by kind.
    """
    reasons = left_out(index.shards)
    yield f"{place}: {index.samples} samples in {len(index.shards)} shards, {reasons.total()} left out"
    for reason, count in reasons.most_common(MOST_REASONS):
        yield f"  {count} left out: {in_one_line(reason)}"
    others: Counter[str] = Counter()
    for shard in index.shards:
        others.update(shard.others)
    for kind, count in others.most_common(MOST_REASONS):
        yield f"  {count} members of no use: {in_one_line(kind)}"
    for kind, count in sorted(files.items()):
        yield f"  passed over: {count} {in_one_line(kind)}"
    damaged = [shard for shard in index.shards if shard.note]
    for shard in damaged[:MOST_NOTES]:
        yield f"  {in_one_line(shard.name)}: {in_one_line(shard.note)}"
    if len(damaged) > MOST_NOTES:
        yield f"  and {len(damaged) - MOST_NOTES} more damaged shards: hdm-shards verify {shlex.quote(place)}"


def left_out(shards: Iterable[ShardRecord]) -> Counter[str]:
    """How many samples are left out, by reason."""
    return Counter(reason for shard in shards for reason in shard.skip.values())


def require_samples(index: Index, place: str) -> None:
    """Raise UserError, with the commonest reason, where no sample of an index can be used."""
    if not index.samples:
        raise no_samples(index.shards, place)


def no_samples(shards: Iterable[ShardRecord], place: str) -> UserError:
    """What to say of shards whose index has left out all samples."""
    shards = list(shards)
    reasons = left_out(shards)
    notes = [shard.note for shard in shards if shard.note]
    ((reason, _),) = reasons.most_common(1) or [(notes[0] if notes else "the shards are empty", 0)]
    what = f"none of {reasons.total()} samples can be used: {reason}"
    if "side by side" in reason:
        hint = "make the archives again with tar --sort=name"
    elif "dot" in reason or "only ." in reason:
        hint = "unpack the archives into a folder and run `hdm-shards build folder` on it, which takes such names"
    elif "unpacks it" in reason:
        hint = "unpack the file, and run `hdm-shards index` again"
    else:
        hint = "each sample needs an image and a caption of one name: see `hdm-shards build --help`"
    return UserError(what, where=place, hint=hint)
