"""How the processes of one machine meet and communicate: by a file in a private folder, over loopback only.

torch's default, a TCPStore, listens on every interface without a password, and the rendezvous unpickles what it finds
there; gloo and NCCL listen on the interface of the host name. Nobody else on the network should be able to connect.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

MEETING_FILE = "HDM_MEETING_FILE"
SHARED_STORE_OFF = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@contextmanager
def meeting_place() -> Iterator[Path]:
    """Yield a temporary folder for the rendezvous files that only this user can enter.

    Inside the with statement torch's launcher opens no TCPStore of its own.
    """
    before = os.environ.get(SHARED_STORE_OFF)
    os.environ[SHARED_STORE_OFF] = "1"
    try:
        with tempfile.TemporaryDirectory(prefix="hdm-meeting-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    finally:
        os.environ.pop(SHARED_STORE_OFF) if before is None else os.environ.update({SHARED_STORE_OFF: before})


def will_meet_at(file: str) -> None:
    """Make `join` use this file and keep sockets on loopback in this process, overriding the cluster's settings."""
    os.environ[MEETING_FILE] = file
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    os.environ["NCCL_SOCKET_IFNAME"] = f"={LOOPBACK}"  # exactly this one; a bare name is a prefix


def join(backend: str, rank: int, world_size: int) -> None:
    """Join the process group at the file passed to `will_meet_at`."""
    store = dist.FileStore(os.environ[MEETING_FILE], world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
