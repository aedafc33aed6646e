"""Takes the output of img2dataset (`output_format=webdataset`) as it is: an index beside its shards is all it needs."""

import argparse
import json
from collections import Counter
from itertools import count
from pathlib import Path

from hdm_lightning.data.index import Index
from hdm_lightning.data.parallel import available_cores, progress_bar
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.datasets.build import REJECTED
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import write_text

COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")


def index_img2dataset(folder: str | Path, *, processes: int | None = None) -> Index:
    """Index the shards of a folder in place and write `rejected.tsv`, one line a sample that was left out.

    Raises:
        UserError: there is no shard.
    """
    root = Path(folder)
    shards = sorted(root.glob("*.tar"))
    if not shards:
        raise UserError(
            "there is no .tar file here",
            where=str(root),
            hint="run img2dataset with output_format=webdataset, or use `hdm-shards build folder` on its files",
        )
    done = count(1)
    with progress_bar("shards", len(shards)) as show:
        jobs = processes or available_cores()
        index = index_shards(root, jobs=jobs, progress=lambda record: show(next(done)))
    lines = [f"{shard.name}#{ordinal}\t{reason}\n" for shard in index.shards for ordinal, reason in shard.skip.items()]
    write_text(root / REJECTED, "".join(lines))
    return index


def downloads(folder: str | Path) -> Counter[str]:
    """What img2dataset's own `*_stats.json` files count, over all shards: see `COUNTS`."""
    found: Counter[str] = Counter()
    for path in sorted(Path(folder).glob("*_stats.json")):
        try:
            stats = json.loads(path.read_bytes())
        except ValueError:
            continue
        found.update({name: int(stats.get(name, 0)) for name in COUNTS})
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hdm-shards build img2dataset`."""
    parser.add_argument("folder", help="img2dataset's output folder; the index is written into it")
    parser.add_argument("--processes", type=int, help="default: one a core")


def run(arguments: argparse.Namespace) -> int:
    """Index as the arguments say and print what was found."""
    index = index_img2dataset(arguments.folder, processes=arguments.processes)
    counts = downloads(arguments.folder)
    if counts:
        print(f"img2dataset: {counts['successes']} of {counts['count']} downloads succeeded")
    left_out = sum(len(shard.skip) for shard in index.shards)
    print(f"{index.samples} samples in {len(index.shards)} shards, {left_out} left out: {arguments.folder}")
    return 0
