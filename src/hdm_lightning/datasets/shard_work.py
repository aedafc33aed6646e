"""Sets of shards that are made of other shards, one by one: each is there whole or not at all, by one call at a time.

Several devices work side by side, a process each, on shards of their own.
"""

import fcntl
import hashlib
import multiprocessing
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
from hdm_lightning.data.sample_plan import PlannedShard
from hdm_lightning.data.sample_table import LATENT, Form, RawSample
from hdm_lightning.data.shard_bytes import is_local, read_range
from hdm_lightning.datasets.journal import ANEW, LOCK, holds_nothing, require_own
from hdm_lightning.errors import UserError
from hdm_lightning.json_files import parse_object
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import make_folder, no_follow

SPAN_BYTES = 16 << 20
"""Of neighbouring samples that are read at once; one alone may be larger."""

Numbered = TypeVar("Numbered")
Made = TypeVar("Made")


def worked_off(
    shards: Sequence[PlannedShard],
    devices: Sequence[str],
    start: Callable[[str], Callable[[PlannedShard], Made]],
    *,
    hint: str,
) -> Iterator[Made]:
    """What becomes of shards, as they are done.

    Args:
        shards: to work on.
        devices: `cuda:0`, `cpu`, …: a process each; one works in this process.
        start: makes, of the name of a device, what works there; picklable for several devices.
        hint: what to do where a process dies for want of memory.

    Raises:
        UserError: a process has died, or whatever the work raises.
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
            what = "a process has died; was there enough memory?"
            raise UserError(what, hint=f"{hint}, and start the same command again") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_prepared: "Callable[[], Callable[[PlannedShard], Any]] | None" = None
"""In a process that works: what makes its worker with the first shard, when mistakes can be told."""


def _begin(
    start: Callable[[str], Callable[[PlannedShard], Any]], waiting: "multiprocessing.Queue[str]", threads: int
) -> None:
    global _prepared
    if threads:
        import torch  # noqa: PLC0415  (not all that is made of shards needs it)

        torch.set_num_threads(threads)
    _prepared = cache(partial(start, waiting.get()))


def _work(shard: PlannedShard) -> Any:
    assert _prepared is not None
    return _prepared()(shard)


@contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[None]:
    """Keep other calls out of a set's folder. Raises UserError: one is `doing` its work there.

    Where the file system knows no locks, as some of clusters, a line says so, and the work is done.
    """
    with open(folder / LOCK, "a", opener=no_follow) as handle:  # which may be somebody's: nothing of it is lost
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "let it work, and start this again when it has ended"
            raise UserError(f"another process is {doing} into this folder", where=str(folder), hint=hint) from error
        except OSError as error:
            what = f"{folder} cannot be locked ({error.strerror}): another call into it would go unnoticed"
            print(in_one_line(f"warning: {what}"), file=sys.stderr, flush=True)
        yield


@contextmanager
def building_in(journal: Path) -> Iterator[None]:
    """Make the folder of a builder's journal, and keep other calls out of it.

    Raises:
        UserError: it has shards of others, there can be none, or another call is at work there.
    """
    require_own(journal)
    make_folder(journal.parent)
    with alone_in(journal.parent, "building"):
        yield


def require_images(
    shards: Iterable[PlannedShard], hint: str = "name the shards of images that they were encoded from", why: str = ""
) -> None:
    """Raise UserError where a shard holds latents."""
    for shard in shards:
        if any(extension == LATENT for layout in shard.record.layouts for extension, _ in layout.members):
            raise UserError(f"this shard holds latents{why}", where=shard.url, hint=hint)


def is_begun(file: Path, is_same: Callable[[dict[str, Any]], bool], holds: str) -> bool:
    """Whether there is a set that `file` describes.

    Raises:
        UserError: it `holds` something else than is to be made, and some of it is made.
    """
    if not file.is_file():
        return False
    with suppress(ValueError, KeyError, TypeError):
        if is_same(parse_object(file.read_bytes())):
            return True
    if holds_nothing(file.parent, file.name):
        return False
    raise UserError(f"this folder holds {holds}", where=str(file.parent), hint=ANEW)


def require_names_of_their_own(shards: Sequence[PlannedShard], place: str) -> None:
    """Raise UserError where two shards of a place would get the same name."""
    known: dict[str, str] = {}
    for shard in shards:
        name = shard.record.name
        if name in known:
            what = f"{known[name]} and {shard.url} would both become {name}"
            raise UserError(what, where=place, hint="give each folder an --out of its own")
        known[name] = shard.url


def require_apart(shards: Iterable[PlannedShard], out: Path) -> None:
    """Raise UserError where a new set would lie below the shards that it is made of, whose next index takes it in."""
    place = out.resolve()
    for folder in {shard.url.removesuffix(shard.record.name) or "." for shard in shards if is_local(shard.url)}:
        if Path(folder).resolve() in place.parents:
            what = f"lies inside {folder.rstrip('/')}, whose next index would hold the new shards beside the old ones"
            begun = out.is_dir() and any(out.iterdir())
            hint = "name a folder beside it" + ", and move there what is in this one to go on with it" * begun
            raise UserError(what, where=str(out), hint=hint)


def digest_of(shards: Sequence[PlannedShard], *options: Any) -> str:
    """A hash of shards and of options, which tells one set that is made of them from another."""
    digest = hashlib.sha256(repr(options).encode())
    for shard in shards:
        digest.update(f"{shard.record.name} {shard.samples} {shard.record.sha256}\n".encode())
    return digest.hexdigest()[:32]


def require_room(out: Path, missing: int, what: str = "the latents") -> int:
    """Free bytes where `out` is or will be. Raises UserError: they are fewer than `missing`."""
    there = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < missing:
        raise UserError(
            f"{what} take {missing / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free",
            where="--out",
            hint="name a folder on another disk, have less made, or free space",
        )
    return free


class Job(NamedTuple):
    """One sample of a shard: where it lies, and the size of the original, 0 where unknown."""

    ordinal: int
    start: int
    end: int
    form: Form
    height: int
    width: int


def jobs_of(shard: PlannedShard) -> list[Job]:
    """The planned samples of a shard, in its order."""
    table, (height, width) = shard.table(), shard.shapes()
    ends = (table.start + table.size).tolist()
    rows = zip(
        table.ordinal.tolist(), table.start.tolist(), ends, table.forms(), height.tolist(), width.tolist(), strict=True
    )
    return [Job(*row) for row in rows]


def read_job(files: LocalFiles, url: str, job: Job) -> bytes:
    """The bytes of a sample of a shard. Raises UserError: they cannot be read."""
    try:
        return files.read(url, job.start, job.end) if is_local(url) else read_range(url, job.start, job.end)
    except OSError as error:
        hint = "look at the storage of the images; the same command resumes"
        raise UserError(f"the shard cannot be read ({error})", where=url, hint=hint) from error


def samples_of(files: LocalFiles, shard: PlannedShard) -> Iterator[tuple[int, RawSample | str]]:
    """Row and sample of all that is planned of a shard, or why it cannot be read; neighbours are read together."""
    jobs = jobs_of(shard)
    for first, last in _spans(jobs):
        whole = Job(0, jobs[first].start, jobs[last].end, jobs[first].form, 0, 0)
        data = read_job(files, shard.url, whole)
        for row in range(first, last + 1):
            begin = jobs[row].start - whole.start
            try:
                yield row, jobs[row].form.cut(data[begin : begin + jobs[row].end - jobs[row].start])
            except SampleFault as fault:
                yield row, str(fault)


def _spans(jobs: Sequence[Job]) -> Iterator[tuple[int, int]]:
    """First and last of neighbours that are read at once."""
    first = 0
    for row, job in enumerate(jobs):
        if row > first and job.end - jobs[first].start > SPAN_BYTES:
            yield first, row - 1
            first = row
    if jobs:
        yield first, len(jobs) - 1


def ahead(batches: Iterable[Numbered], count: int) -> Iterator[Numbered]:
    """The same, each taken from the source while `count` before it are in use: some are read while others are used."""
    waiting: deque[Numbered] = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
