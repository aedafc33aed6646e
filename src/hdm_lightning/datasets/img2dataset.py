"""Use the output of img2dataset (`output_format=webdataset`) as it is: it only needs an index next to its shards."""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from hdm_lightning.argument_types import whole_number
from hdm_lightning.data.index import Index
from hdm_lightning.data.index_report import require_samples, told
from hdm_lightning.data.parallel import available_cores, progress_bar
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.data.shard_files import find_shards, no_shards
from hdm_lightning.datasets.journal import write_rejected
from hdm_lightning.errors import UserError
from hdm_lightning.json_files import parse_object
from hdm_lightning.printable import in_one_line
from hdm_lightning.regular_files import read_regular

MAX_STATS_BYTES = 16 << 20
STATS = "_stats.json"
COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")
MOST_ERRORS = 6
MOST_ERRORS_A_SHARD = 100
MOST_LETTERS = 200


def index_img2dataset(folder: str | Path, *, processes: int | None = None) -> Index:
    """Index the shards of a folder in place and write `rejected.tsv`, which has one line per sample left out.

    Raises:
        UserError: there are no shards.
    """
    root = Path(folder)
    if not root.is_dir() or not (names := find_shards(root).names):
        error = no_shards(root)
        hint = "run img2dataset with output_format=webdataset, or use `hdm-shards build folder` on its files"
        raise UserError(error.what, where=str(root), hint=hint)
    done = count(1)
    with progress_bar("shards", len(names)) as show:
        jobs = processes or available_cores()
        index = index_shards(root, jobs=jobs, progress=lambda record: show(next(done)))
    reasons = {f"{shard.name}#{ordinal}": reason for shard in index.shards for ordinal, reason in shard.skip.items()}
    reasons |= {shard.name: shard.note for shard in index.shards if shard.note}
    write_rejected(root, sorted(reasons.items()))
    return index


@dataclass
class Downloads:
    """Totals of img2dataset's own `*_stats.json` files over all shards."""

    counts: Counter[str] = field(default_factory=Counter)
    """Numbers of URLs; see `COUNTS`."""
    errors: Counter[str] = field(default_factory=Counter)
    """Number of failures by message, the most common ones of each shard."""
    finished: set[str] = field(default_factory=set)
    """Names of the shards that have such a file, without their suffix."""

    def told(self, shards: Iterable[str]) -> Iterator[str]:
        """Yield lines on how the downloads went, and on the shards without such a file, which are incomplete."""
        if not self.finished:
            return
        tried, good, failed, unusable = (self.counts[name] for name in COUNTS)
        yield f"img2dataset: {good} of {tried} downloads succeeded, {failed} failed, {unusable} were unusable"
        for error, times in self.errors.most_common(MOST_ERRORS):
            yield f"  {times} failed: {in_one_line(error[:MOST_LETTERS])}"
        if missing := sorted(name for name in shards if name.removesuffix(".tar") not in self.finished):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            yield (
                f"  not finished: {in_one_line(missing[0])}{more}; to resume, delete index.json, which img2dataset "
                "takes for a file of its own, and run its command again"
            )


def downloads(folder: str | Path) -> Downloads:
    """Read the `*_stats.json` files of a folder; those that cannot be read are skipped."""
    found = Downloads()
    for path in sorted(Path(folder).glob(f"*{STATS}")):
        try:
            stats = parse_object(read_regular(path, MAX_STATS_BYTES))
        except (OSError, ValueError):
            continue
        found.finished.add(path.name.removesuffix(STATS))
        found.counts.update(_whole_numbers(stats, COUNTS))
        states = stats.get("status_dict")
        errors = _whole_numbers(states, states.keys() - {"success"}) if isinstance(states, dict) else {}
        found.errors.update(dict(Counter(errors).most_common(MOST_ERRORS_A_SHARD)))
    return found


def _whole_numbers(given: dict[str, Any], names: Iterable[str]) -> dict[str, int]:
    return {name: value for name in names if type(value := given.get(name)) is int}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build img2dataset`."""
    parser.add_argument("folder", help="img2dataset's output folder; the index is written into it")
    parser.add_argument("--processes", type=whole_number(1), help="default: one per core")


def run(arguments: argparse.Namespace) -> int:
    """Index the folder in the arguments and print what was found."""
    index = index_img2dataset(arguments.folder, processes=arguments.processes)
    for line in downloads(arguments.folder).told(shard.name for shard in index.shards):
        print(line)
    for line in told(index, arguments.folder, find_shards(Path(arguments.folder)).others):
        print(line)
    require_samples(index, arguments.folder)
    return 0
