"""Compare shards with their index, and leave bad samples out of it."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.decode import load_upright
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.index import INDEX_NAME, Index, load_index, write_index
from hdm_lightning.data.latent_sets import unpack_latent
from hdm_lightning.data.parallel import ordered_map
from hdm_lightning.data.sample_table import LATENT, RawSample
from hdm_lightning.data.scanning import require_one_set
from hdm_lightning.data.shard_files import find_shards
from hdm_lightning.data.shard_record import ShardRecord
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

MISSING = "missing"


@dataclass(frozen=True)
class Problem:
    """A problem with a shard (`ordinal` is None) or with one of its samples."""

    shard: str
    reason: str
    ordinal: int | None = None
    key: str = ""

    def __str__(self) -> str:
        sample = "" if self.ordinal is None else f" sample {self.ordinal} ({self.key or 'unreadable'})"
        return in_one_line(f"{self.shard}{sample}: {self.reason}")


def verify(
    folder: str | Path,
    *,
    decode: bool = False,
    captions: CaptionRules | None = None,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Problem]:
    """Compare the shards of a local folder with their index.

    Args:
        folder: with the index.
        decode: also decode every usable sample and read its caption.
        captions: how captions are found; None for the defaults.
        jobs: number of processes that read in parallel.
        progress: called with the number of shards done.

    Raises:
        UserError: there is no index.
    """
    root, index = Path(folder), load_index(folder)
    require_one_set(root)
    check = partial(_verify_shard, root, captions or CaptionRules() if decode else None)
    problems: list[Problem] = []
    for done, found in enumerate(ordered_map(check, index.shards, processes=min(jobs, len(index.shards))), start=1):
        problems += found
        if progress is not None:
            progress(done)
    known = {record.name for record in index.shards}
    strangers = sorted(set(find_shards(root).names) - known)
    return problems + [Problem(name, "is not in the index") for name in strangers]


def leave_out(folder: str | Path, problems: Sequence[Problem]) -> Index:
    """Mark samples with problems as left out in the index, and return it; this changes the plan of the folder.

    Missing shards are removed from the index.
    """
    root, index = Path(folder), load_index(folder)
    missing = {problem.shard for problem in problems if problem.reason == MISSING}
    by_shard: dict[str, dict[int, str]] = defaultdict(dict)
    for problem in problems:
        if problem.ordinal is not None:
            by_shard[problem.shard][problem.ordinal] = problem.reason
    shards = []
    for record in index.shards:
        if record.name in missing:
            continue
        found = by_shard[record.name]
        new = {ordinal: reason for ordinal, reason in found.items() if ordinal not in record.skip}
        shards.append(replace(record, skip={**record.skip, **new}, samples=record.samples - len(new)))
    changed = replace(index, shards=tuple(shards))
    write_index(changed, root / INDEX_NAME)
    return changed


def _verify_shard(root: Path, captions: CaptionRules | None, record: ShardRecord) -> list[Problem]:
    path = root / record.name
    problems = [Problem(record.name, record.note)] if record.note else []
    if not path.is_file():
        return [*problems, Problem(record.name, MISSING)]
    size = path.stat().st_size
    with path.open("rb") as handle:
        if size != record.bytes:
            problems.append(Problem(record.name, f"has {size} bytes, the index says {record.bytes}"))
        elif hashlib.file_digest(handle, "sha256").hexdigest() != record.sha256:
            problems.append(Problem(record.name, "wrong checksum"))
    try:
        record.table(), record.shapes()
    except UserError as error:  # about the columns, which are unpacked only when samples are read
        return [*problems, Problem(record.name, error.what)]
    return problems + (list(_bad_samples(path, record, captions)) if captions is not None else [])


def _bad_samples(path: Path, record: ShardRecord, captions: CaptionRules) -> Iterator[Problem]:
    table = record.table()
    places = zip(table.ordinal.tolist(), table.start.tolist(), table.size.tolist(), table.forms(), strict=True)
    with path.open("rb") as handle:
        for ordinal, start, size, form in places:
            key = ""
            try:
                sample = form.cut(os.pread(handle.fileno(), size, start))
                key = sample.key
                _check_image(sample)
                captions.first(sample.members)
            except SampleFault as fault:
                yield Problem(record.name, str(fault), ordinal, key)


def _check_image(sample: RawSample) -> None:
    """Raise `SampleFault` if the image, or the latent instead of it, cannot be used."""
    if LATENT not in sample.members:
        load_upright(sample.image())
    elif unpack_latent(sample.members[LATENT])[1] is None:
        raise SampleFault("no latent: the image could not be encoded")
