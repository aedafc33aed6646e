"""hdm-shards index."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from hdm_lightning.cli.counts import at_least
from hdm_lightning.cli.outputs import require_file
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

if TYPE_CHECKING:
    from hdm_lightning.data.index import Index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("places", nargs="+", metavar="FOLDER|PATTERN", help="local folders, or remote shards")
    parser.add_argument("--out", help="where the index of remote shards goes (for local ones it lies beside them)")
    parser.add_argument("--new-only", action="store_true", help="keep what the index says of unchanged local shards")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="processes that read side by side (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Index and print one line a folder."""
    from hdm_lightning.data.scanning import index_remote, index_shards  # noqa: PLC0415 (loads torch)
    from hdm_lightning.data.shard_bytes import is_local  # noqa: PLC0415 (as above)

    remote = [place for place in arguments.places if not is_local(place)]
    if remote and (not arguments.out or len(remote) < len(arguments.places)):
        raise UserError("remote shards are indexed by themselves, into a local file", where="--out", hint="give --out")
    if remote:
        require_file(Path(arguments.out), "--out")
        with _bar() as show:
            index = index_remote(remote, arguments.out, jobs=arguments.jobs, progress=show)
        _tell(index, arguments.out)
        return 0
    for folder in arguments.places:
        with _bar() as show:
            index = index_shards(folder, jobs=arguments.jobs, new_only=arguments.new_only, progress=show)
        _tell(index, folder)
    return 0


@contextmanager
def _bar() -> Iterator[Callable[[object], None]]:
    """How many shards are done, on a terminal."""
    from hdm_lightning.data.parallel import progress_bar  # noqa: PLC0415 (for --help's sake)

    done = count(1)
    with progress_bar("shards", None) as show:
        yield lambda record: show(next(done))


def _tell(index: "Index", place: str) -> None:
    """One line of what was found, and one for each shard that is damaged."""
    left_out = sum(len(shard.skip) for shard in index.shards)
    print(f"{place}: {index.samples} samples in {len(index.shards)} shards, {left_out} left out")
    for shard in index.shards:
        if shard.note:
            print(f"  {in_one_line(shard.name)}: {in_one_line(shard.note)}")
