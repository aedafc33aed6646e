"""Builds shards from a list of items in parallel; a build that was interrupted resumes where it was.

Shard i holds what becomes of the items from i·n on, so that shards do not depend on each other. A journal has one
line a finished shard; what it does not name is built again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.parallel import available_cores, ordered_map, progress_bar
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.datasets.writer import Field, require_no_shards, write_shard
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import append_line, read_lines, write_text

JOURNAL = "build.jsonl"
REJECTED = "rejected.tsv"


class Item(NamedTuple):
    """Something that becomes a sample: its name, and how many times it was named before."""

    name: str
    repeat: int = 0


Make = Callable[[Item], dict[str, Field]]
"""An item to the fields of its sample; raises `SampleFault` to reject it. Must be picklable."""


class _Shard(NamedTuple):
    name: str
    first: int
    items: list[Item]


@dataclass(frozen=True)
class Report:
    """What a build did: samples written, and (name, reason) of each rejected file."""

    samples: int
    rejected: list[tuple[str, str]]


def build_shards(
    out: Path,
    items: Sequence[Item],
    make: Make,
    *,
    options: dict[str, Any],
    samples_per_shard: int = 1000,
    processes: int | None = None,
    prefix: str = "shard",
) -> Report:
    """Write shards, their index and `rejected.tsv`, one line a rejected file.

    Args:
        out: made when missing; a build with the same items and options that was interrupted in it resumes.
        items: in order; key of a sample is its number in this list.
        make: what makes a sample of an item.
        options: what shapes the build, to notice that a folder holds another one.
        samples_per_shard: items a shard; rejected ones leave it smaller.
        processes: None means one a core.
        prefix: beginning of the shards' names.

    Raises:
        UserError: there are no items, none can be used, or the folder holds another build.
    """
    if samples_per_shard < 1:
        raise UserError(f"is {samples_per_shard}", where="--samples-per-shard", hint="give 1 or more")
    if not items:
        raise UserError("there is no image here", where=str(options.get("folder", out)), hint="name another folder")
    out.mkdir(parents=True, exist_ok=True)
    header = {**options, "samples_per_shard": samples_per_shard, "items": _digest(items)}
    rows = _open_journal(out, header)
    shards = list(_shards(items, samples_per_shard, prefix))
    missing = [shard for shard in shards if shard.name not in rows]
    with progress_bar("shards", len(shards)) as show:
        made = ordered_map(partial(_write, out, make), missing, processes=processes)
        for shard, row in zip(missing, made, strict=True):
            rows[shard.name] = row
            append_line(out / JOURNAL, {"shard": shard.name, **row})
            show(len(rows))
    return _finish(out, rows, processes or available_cores())


def _finish(out: Path, rows: dict[str, dict[str, Any]], jobs: int) -> Report:
    rejected = sorted({(name, reason) for row in rows.values() for name, reason in row["rejected"]})
    lines = (f"{name}\t{' '.join(reason.split())}\n" for name, reason in rejected)
    write_text(out / REJECTED, "".join(lines), errors="backslashreplace")
    samples = sum(row["samples"] for row in rows.values())
    if not samples:
        hint = f"see {REJECTED} for the reasons"
        raise UserError(
            f"all {len(rejected)} files were rejected, the first for: {rejected[0][1]}", where=str(out), hint=hint
        )
    index_shards(out, jobs=jobs)
    return Report(samples, rejected)


def _shards(items: Sequence[Item], samples_per_shard: int, prefix: str) -> Iterator[_Shard]:
    for number, first in enumerate(range(0, len(items), samples_per_shard)):
        yield _Shard(f"{prefix}-{number:05d}.tar", first, list(items[first : first + samples_per_shard]))


def _write(out: Path, make: Make, shard: _Shard) -> dict[str, Any]:
    """Write one shard; returns its row of the journal."""
    samples, rejected = {}, []
    for number, item in enumerate(shard.items, start=shard.first):
        try:
            samples[f"{number:08d}"] = make(item)
        except (SampleFault, OSError) as fault:
            rejected.append((item.name, str(fault)))
    if samples:
        write_shard(out / shard.name, samples)
    return {"samples": len(samples), "rejected": rejected}


def _open_journal(out: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the shards that are finished."""
    path = out / JOURNAL
    if not path.exists():
        require_no_shards(out)
        append_line(path, header)
        return {}
    found, *rest = read_lines(path) or [{}]
    if found != json.loads(json.dumps(header)):
        raise UserError(
            "the folder holds a build of other files or with other options",
            where=str(out),
            hint="name another folder, or delete this one",
        )
    rows: dict[str, dict[str, Any]] = {}
    for row in rest:
        if not row["samples"] or (out / row["shard"]).exists():
            rows[row["shard"]] = {"samples": row["samples"], "rejected": [tuple(pair) for pair in row["rejected"]]}
    return rows


def _digest(items: Sequence[Item]) -> str:
    return hashlib.sha256(
        "\n".join(f"{item.name}\t{item.repeat}" for item in items).encode("utf-8", "replace")
    ).hexdigest()
