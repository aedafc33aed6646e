"""Make sets of shards from other shards, one by one: each is written whole or not at all, by one call at a time.

Several devices work in parallel, one process each, on different shards.
"""

import fcntl
import hashlib
import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.parallel import available_cores, interruptible, starting_quietly
from hdm_lightning.data.reader import LocalFiles
from hdm_lightning.data.rules import Source
from hdm_lightning.data.sample_plan import PlannedShard
from hdm_lightning.data.sample_table import LATENT, Form, RawSample
from hdm_lightning.data.shard_bytes import is_local, read_range
from hdm_lightning.data.source_shards import resolve
from hdm_lightning.datasets.journal import ANEW, LOCK, holds_nothing
from hdm_lightning.datasets.writer import require_no_shards
from hdm_lightning.errors import UserError
from hdm_lightning.json_files import parse_object
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import make_folder, no_follow

SPAN_BYTES = 16 << 20
"""Most bytes of neighboring samples read at once; a single sample may be larger."""

Numbered = TypeVar("Numbered")
Made = TypeVar("Made")


def shards_in(place: str) -> list[PlannedShard]:
    """Return the shards of a folder or pattern, with all their usable samples.

    Raises:
        UserError: an index is missing.
    """
    return [PlannedShard.whole(url, record) for url, record in resolve(Source((place,)))]


def worked_off(
    shards: Sequence[PlannedShard],
    devices: Sequence[str],
    start: Callable[[str], Callable[[PlannedShard], Made]],
    *,
    hint: str,
) -> Iterator[Made]:
    """Yield the results for shards as they finish.

    Args:
        shards: to work on.
        devices: `cuda:0`, `cpu`, …: one process each; a single device works in this process.
        start: makes the worker for a device, given by name; must be picklable if there are several devices.
        hint: what to do if a process dies for lack of memory.

    Raises:
        UserError: a process died. Errors of the work are raised as they are.
    """
    devices = devices[: max(1, len(shards))]
    if len(devices) == 1:
        yield from map(start(devices[0]), shards)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    waiting = context.Queue()
    for device in devices:
        waiting.put(device)
    threads = available_cores() // len(devices) if all(device == "cpu" for device in devices) else 0
    with ProcessPoolExecutor(
        len(devices), mp_context=context, initializer=_begin, initargs=(start, waiting, threads)
    ) as pool:
        try:
            with starting_quietly():
                running: list[Future[Made]] = [pool.submit(interruptible, _work, shard) for shard in shards]
            for future in as_completed(running):
                yield future.result()
        except BrokenProcessPool as error:
            what = "a process died, possibly for lack of memory"
            raise UserError(what, hint=f"{hint}, and run the same command again") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_prepared: "Callable[[], Callable[[PlannedShard], Any]] | None" = None
"""In a worker process: makes its worker at the first shard, when errors can be reported."""


def _begin(
    start: Callable[[str], Callable[[PlannedShard], Any]], waiting: "multiprocessing.Queue[str]", threads: int
) -> None:
    global _prepared
    if threads:
        import torch  # noqa: PLC0415  (not every kind of set needs it)

        torch.set_num_threads(threads)
    _prepared = cache(partial(start, waiting.get()))


def _work(shard: PlannedShard) -> Any:
    assert _prepared is not None
    return _prepared()(shard)


@contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[None]:
    """Keep other calls out of a set's folder, which is created if missing.

    If the file system has no locks, as on some clusters, print a warning and do the work.

    Raises:
        UserError: another call is `doing` its work there, or the folder cannot be created.
    """
    make_folder(folder)
    with open(folder / LOCK, "a", opener=no_follow) as handle:  # "a": it may be a user's file, which loses nothing
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "let it finish, then run this command again"
            raise UserError(f"another process is {doing} into this folder", where=str(folder), hint=hint) from error
        except OSError as error:
            what = f"{folder} cannot be locked ({error.strerror}): another call writing into it would go unnoticed"
            print(in_one_line(f"warning: {what}"), file=sys.stderr, flush=True)
        yield


@contextmanager
def building_in(journal: Path) -> Iterator[None]:
    """Create the folder of a builder's journal, and keep other calls out of it.

    Raises:
        UserError: it holds shards but no journal, cannot be created, or another call is working in it.
    """
    if not os.path.lexists(journal):  # before anything is written
        require_no_shards(journal.parent)
    with alone_in(journal.parent, "building"):
        yield


def require_images(
    shards: Iterable[PlannedShard], hint: str = "name the shards of images that they were encoded from", why: str = ""
) -> None:
    """Raise UserError if a shard holds latents."""
    for shard in shards:
        if any(extension == LATENT for layout in shard.record.layouts for extension, _ in layout.members):
            raise UserError(f"this shard holds latents{why}", where=shard.url, hint=hint)


def is_begun(file: Path, is_same: Callable[[dict[str, Any]], bool], holds: str) -> bool:
    """Return whether `file` exists and describes the set to be made.

    Raises:
        UserError: the folder holds part of another set; the message says what it `holds`.
    """
    if not file.is_file():
        return False
    with suppress(ValueError, KeyError, TypeError):
        if is_same(parse_object(file.read_bytes())):
            return True
    if holds_nothing(file.parent, file.name):
        return False
    raise UserError(f"this folder holds {holds}", where=str(file.parent), hint=ANEW)


def require_apart(shards: Sequence[PlannedShard], place: str, out: Path) -> None:
    """Raise UserError if a new set cannot be in a folder.

    Two shards of its source, `place`, would get the same name there, or it is inside the folder of its source, whose
    next index would list the new shards, too.
    """
    known: dict[str, str] = {}
    for shard in shards:
        name = shard.record.name
        if name in known:
            what = f"{known[name]} and {shard.url} would both become {name}"
            raise UserError(what, where=place, hint="use a separate --out for each folder")
        known[name] = shard.url
    for folder in {shard.url.removesuffix(shard.record.name) or "." for shard in shards if is_local(shard.url)}:
        if Path(folder).resolve() in out.resolve().parents:
            what = f"is inside {folder.rstrip('/')}, whose next index would list the new shards with the old ones"
            begun = out.is_dir() and any(out.iterdir())
            hint = "name a folder next to it" + ", and move the content of this one there to resume" * begun
            raise UserError(what, where=str(out), hint=hint)


def digest_of(shards: Sequence[PlannedShard], *options: Any) -> str:
    """Return a hash of shards and options that identifies the set made from them."""
    digest = hashlib.sha256(repr(options).encode())
    for shard in shards:
        digest.update(f"{shard.record.name} {shard.samples} {shard.record.sha256}\n".encode())
    return digest.hexdigest()[:32]


def require_room(out: Path, missing: int, what: str = "the latents") -> int:
    """Return the free bytes where `out` is or will be. Raises UserError if they are fewer than `missing`."""
    there = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < missing:
        raise UserError(
            f"{what} need {missing / 1e9:.1f} GB more, but only {free / 1e9:.1f} GB are free",
            where="--out",
            hint="name a folder on another disk, make a smaller set, or free space",
        )
    return free


class Job(NamedTuple):
    """One sample of a shard: where it is, and the size of the original, 0 if unknown."""

    ordinal: int
    start: int
    end: int
    form: Form
    height: int
    width: int


def jobs_of(shard: PlannedShard) -> list[Job]:
    """Return the planned samples of a shard, in its order."""
    table, (height, width) = shard.table(), shard.shapes()
    ends = (table.start + table.size).tolist()
    rows = zip(
        table.ordinal.tolist(), table.start.tolist(), ends, table.forms(), height.tolist(), width.tolist(), strict=True
    )
    return [Job(*row) for row in rows]


def read_sample(files: LocalFiles, url: str, job: Job) -> RawSample:
    """Return a sample of a shard.

    Raises:
        SampleFault: its bytes are not those that were indexed.
        UserError: the shard cannot be read.
    """
    return job.form.cut(_read(files, url, job.start, job.end))


def _read(files: LocalFiles, url: str, start: int, end: int) -> bytes:
    try:
        return files.read(url, start, end) if is_local(url) else read_range(url, start, end)
    except OSError as error:
        hint = "check the storage of the images, then run the same command to resume"
        raise UserError(f"the shard cannot be read ({error})", where=url, hint=hint) from error


def samples_of(shard: PlannedShard) -> Iterator[tuple[int, RawSample | str]]:
    """Yield all planned samples, or why one cannot be read, each with its ordinal; neighbors are read together."""
    files, jobs = LocalFiles(), jobs_of(shard)
    for first, last in _spans(jobs):
        begin = jobs[first].start
        data = _read(files, shard.url, begin, jobs[last].end)
        for job in jobs[first : last + 1]:
            try:
                yield job.ordinal, job.form.cut(data[job.start - begin : job.end - begin])
            except SampleFault as fault:
                yield job.ordinal, str(fault)


def _spans(jobs: Sequence[Job]) -> Iterator[tuple[int, int]]:
    """Yield the first and last of neighbors that are read at once."""
    first = 0
    for row, job in enumerate(jobs):
        if row > first and job.end - jobs[first].start > SPAN_BYTES:
            yield first, row - 1
            first = row
    if jobs:
        yield first, len(jobs) - 1


def ahead(batches: Iterable[Numbered], count: int) -> Iterator[Numbered]:
    """Yield the same, taking up to `count` in advance from the source, so that some are read while others are used."""
    waiting: deque[Numbered] = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
