"""How local shards stand to their index when a training starts: replaced, missing, or not in it.

A look at size and time of each costs microseconds, so that thousands of shards hold up nobody. What lies on servers is
compared when it is first read; see `data.reader`.
"""

import math
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.index import same_time
from hdm_lightning.data.sample_plan import Plan, PlannedShard
from hdm_lightning.data.shard_bytes import is_local
from hdm_lightning.data.shard_files import find_shards, is_shard
from hdm_lightning.data.source_shards import addresses_of, known_index, state_of
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

THREADS = 16
"""That ask for sizes and times: a network's file system answers many at once as soon as one."""

LOOKED_INTO, SAMPLES_EACH = 64, 3
"""Shards of another time that are looked into, and samples of each."""


@dataclass(frozen=True)
class Change:
    """A shard that is not what its index says.

    Attributes:
        url: path of the shard.
        place: folder of its index.
        what: what has changed.
        certain: False where only its time is another and the samples that were looked at are the same.
    """

    url: str
    place: str
    what: str
    certain: bool = True

    @classmethod
    def of(cls, shard: PlannedShard, what: str, *, certain: bool = True) -> "Change":
        """That of a shard of a plan."""
        return cls(shard.url, _place(shard), what, certain)


def _place(shard: PlannedShard) -> str:
    return shard.url.removesuffix(shard.record.name).rstrip("/") or "."


def changes(plans: Iterable[Plan]) -> list[Change]:
    """What has become of the local shards of plans since they were indexed.

    Where an index has no times, as those of builders, shards that are younger than the index are looked into. A folder
    that was copied has other times everywhere: where its samples are the same, nothing has changed.
    """
    shards = {shard.url: shard for plan in plans for part in plan.parts for shard in part.shards}
    local = [shard for shard in shards.values() if is_local(shard.url)]
    with ThreadPoolExecutor(THREADS) as pool:
        states = list(pool.map(_state, local, chunksize=64))
    known = [(shard, state) for shard, state in zip(local, states, strict=True) if isinstance(state, int)]
    touched = [shard for shard, state in known if not same_time(shard.record.changed, state)]
    younger = [shard for shard, state in known if not shard.record.changed and state > _indexed(shard)]
    wrong = [Change.of(shard, state) for shard, state in zip(local, states, strict=True) if isinstance(state, str)]
    suspects = touched + younger
    others = [
        Change.of(shard, what)
        for shard in suspects[:: max(1, len(suspects) // LOOKED_INTO)]
        if (what := _other_samples(shard))
    ]
    if others or len(touched) < len(local):
        named = {change.url for change in others}
        what = "was written again after it was indexed; the samples looked at are the same"
        others += [Change.of(shard, what, certain=False) for shard in touched if shard.url not in named]
    return wrong + others


def _indexed(shard: PlannedShard) -> float:
    """When the index of a shard's folder was written, in ns; infinity where it lies elsewhere."""
    state = state_of(_place(shard))
    return math.inf if state is None else state[1]


def _state(shard: PlannedShard) -> int | str | None:
    """Time of the last change in ns, what is wrong, or None where the file system does not tell."""
    try:
        state = os.stat(shard.url)
    except FileNotFoundError:
        return "is missing"
    except OSError:
        return None
    if state.st_size != shard.record.bytes:
        return f"has {state.st_size:,} bytes, the index says {shard.record.bytes:,}"
    return state.st_mtime_ns


def _other_samples(shard: PlannedShard) -> str:
    """What is wrong with the first sample of some of a shard that is not the indexed one; empty where none is."""
    table = shard.table()
    chosen = table.take(np.unique(np.linspace(0, len(table.start) - 1, SAMPLES_EACH).astype(np.int64)))
    ranges = zip(chosen.start.tolist(), chosen.size.tolist(), chosen.forms(), strict=True)
    try:
        with open(shard.url, "rb") as handle:
            for start, size, form in ranges:
                form.cut(os.pread(handle.fileno(), size, start))
    except SampleFault as fault:
        return f"holds other samples than were indexed ({fault})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def require_unchanged(plans: Iterable[Plan]) -> None:
    """Raise UserError where local shards are certainly not what their index says.

    For a training that begins: one that is resumed goes on, and masks what is not there.
    """
    certain = [change for change in changes(plans) if change.certain]
    if certain:
        more = f", and {len(certain) - 1} more shards have changed" if len(certain) > 1 else ""
        raise UserError(f"{certain[0].what}{more}", where=certain[0].url, hint=_way_out(certain[0]))


def notes(plans: Sequence[Plan]) -> Iterator[str]:
    """A line for each kind of change of the local shards of plans, and for shards that their folders' indices lack."""
    found = changes(plans)
    for kind in (True, False):
        alike = [change for change in found if change.certain is kind]
        if alike:
            more = f" (and {len(alike) - 1} more)" if len(alike) > 1 else ""
            yield in_one_line(f"{alike[0].url}{more} {alike[0].what}") + f": {_way_out(alike[0])}"
    sources = [source for plan in plans for source in plan.sources if source.index is None]
    folders = [url for source in sources for url in addresses_of(source)]
    yield from unindexed(list(dict.fromkeys(folders)))


def _way_out(change: Change) -> str:
    return _index_anew(change.place, [os.path.relpath(change.url, change.place)])


def _index_anew(place: str, names: Iterable[str]) -> str:
    """The command that brings the index of a folder up to date; the shards named are in it."""
    behind_links = any(Path(place, above).is_symlink() for name in names for above in Path(name).parents if above.name)
    return f"hdm-shards index --new-only {'--follow-links ' * behind_links}{shlex.quote(place)}"


def unindexed(places: Sequence[str]) -> list[str]:
    """A line for each local folder with shards that its index does not know, which no training sees."""
    lines = []
    for place in places:
        if is_shard(place) or not is_local(place) or not Path(place).is_dir() or known_index(place).resolutions:
            continue
        known = {record.name for record in known_index(place).shards}
        strangers = [name for name in find_shards(Path(place)).names if name not in known]
        if strangers:
            what = f"{place}: {len(strangers)} shards are not in the index and are not used"
            lines.append(f"{what} ({in_one_line(strangers[0])}, ...): {_index_anew(place, known)}")
    return lines
