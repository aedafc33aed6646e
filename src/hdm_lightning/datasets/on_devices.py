"""Work on shards, a process a device, in a folder that no other call writes to meanwhile."""

import fcntl
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from hdm_lightning.data.parallel import available_cores
from hdm_lightning.data.sample_plan import PlannedShard
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import no_follow

Made = TypeVar("Made", covariant=True)


class Worker(Protocol[Made]):
    """What works on whole shards on one device."""

    def encode(self, shard: PlannedShard) -> Made:
        """Work on a shard."""


def on_devices(
    shards: Sequence[PlannedShard], devices: Sequence[str], start: Callable[[str], Worker[Made]], *, hint: str
) -> Iterator[Made]:
    """What a worker makes of each shard, a process a device side by side, each when it is there.

    Args:
        shards: to work on.
        devices: `cuda:0`, `cpu`, …; equal ones may come more than once.
        start: makes the worker of a device; must be picklable for several devices.
        hint: what to do where a process has died.

    Raises:
        UserError: a process has died.
    """
    devices = devices[: max(1, len(shards))]
    if len(devices) == 1:
        yield from map(start(devices[0]).encode, shards)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    waiting = context.Queue()
    for device in devices:
        waiting.put(device)
    threads = max(1, available_cores() // len(devices)) if all(device == "cpu" for device in devices) else None
    begin = partial(_begin, start, threads)
    with ProcessPoolExecutor(len(devices), mp_context=context, initializer=begin, initargs=(waiting,)) as pool:
        running: list[Future[Made]] = [pool.submit(_encode, shard) for shard in shards]
        try:
            for future in as_completed(running):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError("a process that encodes has died; was there enough memory?", hint=hint) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_prepared: "Callable[[], Worker[Any]] | None" = None
"""In a process that works: what makes its worker with the first shard, when mistakes can be told."""


def _begin(start: Callable[[str], Worker[Any]], threads: int | None, waiting: "multiprocessing.Queue[str]") -> None:
    global _prepared
    if threads is not None:
        torch.set_num_threads(threads)
    _prepared = cache(partial(start, waiting.get()))


def _encode(shard: PlannedShard) -> Any:
    assert _prepared is not None
    return _prepared().encode(shard)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other calls out of a folder. Raises UserError: one is at work there."""
    with open(folder / ".lock", "w", opener=no_follow) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "let it work; it uses all devices that it was given"
            raise UserError("another process is encoding into this folder", where=str(folder), hint=hint) from error
        yield
