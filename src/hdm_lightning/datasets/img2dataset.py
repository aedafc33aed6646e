"""Takes the output of img2dataset (`output_format=webdataset`) as it is: an index beside its shards is all it needs."""

import argparse
import json
from collections import Counter
from itertools import count
from pathlib import Path

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.index import Index
from hdm_lightning.data.index_report import require_samples, told
from hdm_lightning.data.parallel import available_cores, progress_bar
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.data.shard_files import find_shards, no_shards
from hdm_lightning.datasets.journal import REJECTED
from hdm_lightning.datasets.source_files import read_file
from hdm_lightning.datasets.source_images import whole_number
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import write_text

MAX_STATS_BYTES = 16 << 20
COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")


def index_img2dataset(folder: str | Path, *, processes: int | None = None) -> Index:
    """Index the shards of a folder in place and write `rejected.tsv`, one line a sample that was left out.

    Raises:
        UserError: there is no shard.
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
    lines = [f"{in_one_line(name)}\t{in_one_line(reason)}\n" for name, reason in sorted(reasons.items())]
    write_text(root / REJECTED, "".join(lines), errors="backslashreplace")
    return index


def downloads(folder: str | Path) -> Counter[str]:
    """What img2dataset's own `*_stats.json` files count, over all shards: see `COUNTS`."""
    found: Counter[str] = Counter()
    for path in sorted(Path(folder).glob("*_stats.json")):
        try:
            stats = json.loads(read_file(path, MAX_STATS_BYTES))
        except (ValueError, RecursionError, OSError, SampleFault):
            continue
        if isinstance(stats, dict):
            found.update({name: value for name in COUNTS if type(value := stats.get(name)) is int})
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build img2dataset`."""
    parser.add_argument("folder", help="img2dataset's output folder; the index is written into it")
    parser.add_argument("--processes", type=whole_number(1), help="default: one a core")


def run(arguments: argparse.Namespace) -> int:
    """Index as the arguments say and print what was found."""
    index = index_img2dataset(arguments.folder, processes=arguments.processes)
    counts = downloads(arguments.folder)
    if counts:
        print(f"img2dataset: {counts['successes']} of {counts['count']} downloads succeeded")
    for line in told(index, arguments.folder, find_shards(Path(arguments.folder)).others):
        print(line)
    require_samples(index, arguments.folder)
    return 0
