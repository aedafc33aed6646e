"""Requirements of a loader's worker processes on the machine, and the detection of dead or stuck ones."""

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
"""How long the workers may send nothing before the run stops with an error instead of waiting forever."""

POLL_S = 5
"""Timeout after which torch looks for dead workers; its signal handler may fire where errors are swallowed."""

TIMED_OUT = "DataLoader timed out after"
"""Beginning of torch's own time-out message; errors that come from workers begin otherwise."""

STOP_GRACE_S = 120
"""How long a worker lives on after SIGTERM, so that its parent process can finish the step and save."""

LONGEST_SOCKET_NAME = 103 if sys.platform == "darwin" else 107
"""Maximum bytes of a socket's path, without the terminating zero."""

FORK = "fork" if sys.platform == "linux" else None
"""Start method of workers: torch's default on Linux, set explicitly because the processes of a run on several devices
were spawned and would spawn theirs, each with seconds of imports at every validation."""

SHARED_MEMORY = "/dev/shm"
PREFETCHED = 2
WORKERS_A_CORE = 4
"""Workers per core above which to warn: some wait for a disk or a server while others work, but not that many."""


def ignore_stop_signals(worker: int) -> None:
    """Keep a worker from dying at once of the signals that ask its parent process to save and stop.

    A signal to all processes of a job also reaches the workers, and a worker that dies makes its parent fail. Workers
    end by themselves when their parent is done or dead.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(STOP_GRACE_S))


def require_room_for_sockets(folder: str) -> None:
    """Raise UserError if paths of the data workers' sockets would be too long: systems allow about a hundred bytes.

    Python creates the sockets as `pymp-XXXXXXXX/listener-XXXXXXXX` in the folder for temporary files. Without this
    check each worker fails in the background, and the training waits for samples that never come.
    """
    name = f"{folder}/pymp-12345678/listener-12345678"
    if len(os.fsencode(name)) > LONGEST_SOCKET_NAME:
        what = f"the path of the temporary folder, {folder}, is too long for the data workers' sockets"
        raise UserError(what, where="TMPDIR", hint="run the command as TMPDIR=/tmp COMMAND, or set data.num_workers=0")


def ranks_here(world: int) -> int:
    """Return how many ranks of a training run on this machine.

    Launchers set LOCAL_WORLD_SIZE; without it, assume one rank per GPU here, or without GPUs that all ranks are here.
    """
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(told) if told.isdecimal() else min(world, torch.cuda.device_count() or world)


def free_shared_memory() -> int | None:
    """Return the free bytes of shared memory, where workers put their samples; None if unknown."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return state.f_bavail * state.f_frsize


def require_shared_memory(workers: int, chunk_bytes: int, free: int | None, loaders: int = 1) -> None:
    """Raise UserError if the samples in transit would not fit: a worker that finds no room hangs.

    Args:
        workers: workers per loader.
        chunk_bytes: size of the samples that a worker sends at a time.
        free: free bytes of shared memory, None if unknown.
        loaders: loaders that run at the same time on this machine: one per rank, twice as many with validation.
    """
    each = (PREFETCHED + 1) * chunk_bytes * loaders
    if free is not None and workers * each > free:
        several = f" in each of {loaders} loaders (of all ranks, training and validation)" if loaders > 1 else ""
        raise UserError(
            f"{workers} data workers{several} need {workers * each / 1e6:.0f} MB of shared memory, but {SHARED_MEMORY} "
            f"has {free / 1e6:.0f} MB free",
            where="data.num_workers",
            hint=f"set data.num_workers={free // each}, or provide more: docker run "
            f"--shm-size={max(1, 2 * workers * each >> 30)}g",
        )


def crowding(workers: int, loaders: int) -> str:
    """Return a warning if there are far more workers than cores, since each takes a while to start; else nothing.

    There are `workers` in each of the training loaders on this machine, one per rank.
    """
    cores, each = available_cores(), f" of each of {loaders} processes" if loaders > 1 else ""
    if workers * loaders <= WORKERS_A_CORE * cores:
        return ""
    fewer = max(1, cores // loaders)
    return (
        f"{workers} data workers{each} share {cores} core{'s' * (cores > 1)} and take a long time to start; "
        f"data.num_workers={fewer} is enough unless the storage of the shards is slow"
    )


KILLED, STUCK = "a data worker was killed", "the data workers sent nothing"


def is_dead_worker(error: BaseException) -> bool:
    """Return whether an exception means that a data worker died or is stuck; torch may raise its own on any line."""
    said = str(error)
    torch_s = said.startswith("DataLoader worker (pid")
    return isinstance(error, RuntimeError) and (torch_s or said.startswith((KILLED, STUCK)))


def naming_dead_workers(chunks: Iterable[Item]) -> Iterator[Item]:
    """Yield the chunks of worker processes, with a clear error if a worker dies or all are stuck.

    torch has such an error, too, unless the worker dies while a chunk's shared memory is in transit.

    Raises:
        RuntimeError: a worker has died, or none has sent anything for `WORKER_TIMEOUT_S`.
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
                what = f"{STUCK} for {WORKER_TIMEOUT_S:g} s; does the storage of the shards respond?"
                raise RuntimeError(what) from error
            yield chunk
            asked = time.monotonic()
    finally:
        _end_workers(iterator)


def _end_workers(iterator: Iterator[object]) -> None:
    """End the workers now: an error's traceback keeps torch's iterator alive, and its garbage collection ends none.

    By then its queues are closed, so it waits ten seconds for workers that never get the message.
    """
    end = getattr(iterator, "_shutdown_workers", None)
    if end is not None:
        end()
