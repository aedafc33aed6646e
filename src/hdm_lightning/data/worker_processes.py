"""What worker processes of a loader need of the machine, and how a dead or stuck one is told."""

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from hdm_lightning.data.parallel import available_cores
from hdm_lightning.errors import UserError

Item = TypeVar("Item")

WORKER_TIMEOUT_S = 900
"""How long a worker may give nothing before the run stops with a message instead of waiting for ever."""

POLL_S = 5
"""Torch looks for dead workers when a wait has timed out; its signal handler may go off where errors are swallowed."""

TIMED_OUT = "DataLoader timed out after"
"""How torch's own message begins; errors of workers come with other beginnings, whatever they say of time-outs."""

STOP_GRACE_S = 120
"""How long a worker lives on after SIGTERM, so that its process can finish the step and save."""

LONGEST_SOCKET_NAME = 103 if sys.platform == "darwin" else 107
"""Bytes of a socket's path; one more ends it."""

FORK = "fork" if sys.platform == "linux" else None
"""How workers start: as torch has it on Linux, also in the processes of a run on several devices, which were spawned
and would spawn theirs, each with seconds of imports at every validation."""

SHARED_MEMORY = "/dev/shm"
PREFETCHED = 2
WORKERS_A_CORE = 4
"""More of them are told: some wait for a disk or a server while others work, not that many."""


def ignore_stop_signals(worker: int) -> None:
    """Let a worker not die at once of the signals that ask its process to save and stop.

    A signal to all processes of a job reaches workers too, and a worker that dies makes its process fail. Workers end
    by themselves when their process is done or dead.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(STOP_GRACE_S))


def require_room_for_sockets(folder: str) -> None:
    """Raise UserError where a socket of the data workers could not be named: systems allow about a hundred bytes.

    Python makes them as `pymp-XXXXXXXX/listener-XXXXXXXX` in the folder for temporary files. Without this check each
    worker fails in the background, and the training waits for samples that never come.
    """
    name = f"{folder}/pymp-12345678/listener-12345678"
    if len(os.fsencode(name)) > LONGEST_SOCKET_NAME:
        what = f"the folder for temporary files, {folder}, has too long a name for the data workers' sockets"
        raise UserError(
            what, where="TMPDIR", hint="start the command as TMPDIR=/tmp COMMAND, or set data.num_workers=0"
        )


def ranks_here(world: int) -> int:
    """How many of the ranks of a training run on this machine.

    Launchers tell it; where nobody does, each GPU here may have one, and without GPUs all are taken to be here.
    """
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(told) if told.isdecimal() else min(world, torch.cuda.device_count() or world)


def free_shared_memory() -> int | None:
    """Bytes free where workers put their samples, None where nobody knows."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return state.f_bavail * state.f_frsize


def require_shared_memory(workers: int, chunk_bytes: int, free: int | None, loaders: int = 1) -> None:
    """Raise UserError where the samples on their way would not fit: a worker that finds no room there hangs.

    Args:
        workers: of each loader.
        chunk_bytes: of the samples that a worker sends together.
        free: bytes, None where nobody knows.
        loaders: that run side by side on this machine: one a rank, and as many that validate.
    """
    each = (PREFETCHED + 1) * chunk_bytes * loaders
    if free is not None and workers * each > free:
        several = f" in each of {loaders} loaders, of all ranks, training and validation," if loaders > 1 else ""
        raise UserError(
            f"{workers} data workers{several} need {workers * each / 1e6:.0f} MB of shared memory, and {SHARED_MEMORY} "
            f"has {free / 1e6:.0f} MB free",
            where="data.num_workers",
            hint=f"set data.num_workers={free // each}, or give more: docker run "
            f"--shm-size={max(1, 2 * workers * each >> 30)}g",
        )


def crowding(workers: int, loaders: int) -> str:
    """What to say of far more workers than cores, each of which takes a while to start; else nothing.

    Args:
        workers: of each loader.
        loaders: that train on this machine, one a rank.
    """
    cores, each = available_cores(), f" of each of {loaders} processes" if loaders > 1 else ""
    if workers * loaders <= WORKERS_A_CORE * cores:
        return ""
    fewer = max(1, cores // loaders)
    return (
        f"{workers} data workers{each} share {cores} core{'s' * (cores > 1)} and take long to start; "
        f"data.num_workers={fewer} is enough unless the storage of the shards is slow"
    )


KILLED, STUCK = "a data worker was killed", "the data workers gave nothing"


def is_dead_worker(error: BaseException) -> bool:
    """Whether an exception says that a data worker has died or is stuck; torch's own may come out of any line."""
    said = str(error)
    torch_s = said.startswith("DataLoader worker (pid")
    return isinstance(error, RuntimeError) and (torch_s or said.startswith((KILLED, STUCK)))


def naming_dead_workers(chunks: Iterable[Item]) -> Iterator[Item]:
    """The chunks of worker processes, with an error that says so where one has died or is stuck.

    torch says so itself, unless the worker dies while a chunk's shared memory is on its way.

    Raises:
        RuntimeError: a worker has died, or none gave anything for long.
    """
    iterator, asked = iter(chunks), time.monotonic()
    try:
        while True:
            try:
                chunk = next(iterator)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:
                raise RuntimeError(f"{KILLED}; was there enough memory?") from error
            except RuntimeError as error:
                if not str(error).startswith(TIMED_OUT):
                    raise
                if time.monotonic() - asked < WORKER_TIMEOUT_S:
                    continue
                what = f"{STUCK} for {WORKER_TIMEOUT_S:g} s; does the storage of the shards answer?"
                raise RuntimeError(what) from error
            yield chunk
            asked = time.monotonic()
    finally:
        _end_workers(iterator)


def _end_workers(iterator: Iterator[object]) -> None:
    """End the workers now: an error's traceback holds torch's iterator, and collected as garbage it ends none of them.

    By then its queues are closed, so that it waits ten seconds for workers that are told nothing.
    """
    end = getattr(iterator, "_shutdown_workers", None)
    if end is not None:
        end()
