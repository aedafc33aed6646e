"""Compare local shards with their index when a training starts: replaced, missing, or not in it.

Checking the size and time of a shard takes microseconds, so thousands of shards cause no delay. Remote shards are
compared when they are first read; see `data.reader`.
"""

import math
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
"""Threads that query sizes and times: a network file system answers many requests as fast as one."""

LOOKED_INTO, SAMPLES_EACH = 64, 3
"""How many shards with a different modification time are checked, and how many samples of each."""


class Change(NamedTuple):
    """A local shard that differs from its index, and how."""

    shard: PlannedShard
    what: str
    certain: bool = True
    """False if only the time differs and the samples that were read are the same."""


def _place(shard: PlannedShard) -> str:
    """Return the folder of a shard's index."""
    return shard.url.removesuffix(shard.record.name).rstrip("/") or "."


def changes(plans: Iterable[Plan]) -> list[Change]:
    """Return the changes of the plans' local shards since they were indexed.

    If an index has no times, like those of builders, samples of shards newer than the index are checked. In a copied
    folder all times differ: if its samples are the same, nothing has changed.
    """
    shards = {shard.url: shard for plan in plans for part in plan.parts for shard in part.shards}
    local = [shard for shard in shards.values() if is_local(shard.url)]
    with ThreadPoolExecutor(THREADS) as pool:
        states = list(pool.map(_state, local, chunksize=64))
    known = [(shard, state) for shard, state in zip(local, states, strict=True) if isinstance(state, int)]
    touched = [shard for shard, state in known if not same_time(shard.record.changed, state)]
    younger = [shard for shard, state in known if not shard.record.changed and state > _indexed(shard)]
    wrong = [Change(shard, state) for shard, state in zip(local, states, strict=True) if isinstance(state, str)]
    suspects = touched + younger
    others = [
        Change(shard, what)
        for shard in suspects[:: max(1, len(suspects) // LOOKED_INTO)]
        if (what := _other_samples(shard))
    ]
    if others or len(touched) < len(local):
        named = {change.shard.url for change in others}
        what = "was rewritten after it was indexed; the samples that were checked are the same"
        others += [Change(shard, what, certain=False) for shard in touched if shard.url not in named]
    return wrong + others


def _indexed(shard: PlannedShard) -> float:
    """Return when the index of a shard's folder was written, in ns; infinity if the index is elsewhere."""
    state = state_of(_place(shard))
    return math.inf if state is None else state[1]


def _state(shard: PlannedShard) -> int | str | None:
    """Return the time of the last change in ns, what is wrong, or None if the file system does not answer."""
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
    """Check a few samples of a shard against the index, and return the first problem, or an empty string."""
    table = shard.table()
    chosen = table.take(np.unique(np.linspace(0, len(table.start) - 1, SAMPLES_EACH).astype(np.int64)))
    ranges = zip(chosen.start.tolist(), chosen.size.tolist(), chosen.forms(), strict=True)
    try:
        with open(shard.url, "rb") as handle:
            for start, size, form in ranges:
                form.cut(os.pread(handle.fileno(), size, start))
    except SampleFault as fault:
        return f"contains other samples than were indexed ({fault})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def require_unchanged(plans: Iterable[Plan]) -> None:
    """Raise UserError if local shards certainly differ from their index.

    For new trainings only: a resumed training continues, and masks missing samples.
    """
    certain = [change for change in changes(plans) if change.certain]
    if certain:
        more = f", and {len(certain) - 1} more shards have changed" if len(certain) > 1 else ""
        raise UserError(f"{certain[0].what}{more}", where=certain[0].shard.url, hint=_way_out(certain[0]))


def notes(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield a line for each kind of change of the plans' local shards, and for shards that are not in the index."""
    found = changes(plans)
    for kind in (True, False):
        alike = [change for change in found if change.certain is kind]
        if alike:
            more = f" (and {len(alike) - 1} more)" if len(alike) > 1 else ""
            yield in_one_line(f"{alike[0].shard.url}{more} {alike[0].what}") + f": {_way_out(alike[0])}"
    sources = [source for plan in plans for source in plan.sources if source.index is None]
    folders = [url for source in sources for url in addresses_of(source)]
    yield from unindexed(list(dict.fromkeys(folders)))


def _way_out(change: Change) -> str:
    place = _place(change.shard)
    return _index_anew(place, [os.path.relpath(change.shard.url, place)])


def _index_anew(place: str, names: Iterable[str]) -> str:
    """Return the command that updates the index of a folder; `names` are the shards in it."""
    behind_links = any(Path(place, above).is_symlink() for name in names for above in Path(name).parents if above.name)
    return f"hdm-shards index --new-only {'--follow-links ' * behind_links}{shlex.quote(place)}"


def unindexed(places: Sequence[str]) -> list[str]:
    """Return a line for each local folder with shards that are missing from its index, and so from any training."""
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
