"""What data workers need of the machine, asked before they start: one that finds it missing hangs."""

import os
import sys

import torch

from hdm_lightning.errors import UserError

LONGEST_SOCKET_NAME = 103 if sys.platform == "darwin" else 107
"""Bytes of a socket's path; one more ends it."""

SHARED_MEMORY = "/dev/shm"
PREFETCHED = 2
"""Chunks that a worker has ready beside the one that it is making."""


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
