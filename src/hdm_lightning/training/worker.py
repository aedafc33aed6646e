"""One process of a run: its lock on the run's folder, signals, process group and host settings.

Only one start at a time may use a run's folder. The kernel frees the lock when the process ends, however it ends.
"""

import errno
import fcntl
import io
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig

from hdm_lightning.data.worker_processes import is_dead_worker
from hdm_lightning.errors import UserError, memory_error
from hdm_lightning.printable import in_one_line
from hdm_lightning.training import hardware, run_folder, world
from hdm_lightning.training.callbacks.stop_on_signal import StoppedBySignal, stop_if_asked
from hdm_lightning.training.composition import plain
from hdm_lightning.training.run_log import kept_in
from hdm_lightning.training.stop_request import STOP
from hdm_lightning.training.strategies import processes
from hdm_lightning.whole_files import disk_full_error, is_disk_full, is_link_error, link_error, no_follow

LESS = (
    "lower the stage's micro_batch_size, which costs some speed, or set its activation_checkpointing; "
    "hdm-plan shows what fits. The same command resumes from the last checkpoint"
)
PATIENCE_S = 30.0
"""Seconds to wait for another start: a killed one takes a moment to die, a stopped one to save."""
POLL_S = 0.1
TAKEN = (errno.EACCES, errno.EAGAIN)


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Keep other starts out of the run's folder inside the with statement; the first process holds the lock.

    It is a POSIX record lock: data workers do not inherit it, it works between machines on NFS, and it is released when
    the process closes any descriptor of the file, so nothing else may open the file here.

    Raises:
        UserError: on every process, if another start keeps using the folder, or the lock's file is a symbolic link.
        StoppedBySignal: on every process, if one was asked to stop in the meantime.
    """
    lock = None

    def hold() -> None:
        nonlocal lock
        lock = take(run_dir)

    try:
        processes.decided_by_first(hold)
        stop_if_asked("before the first step")
        yield
    finally:
        if lock is not None:
            os.close(lock)


def take(run_dir: Path) -> int | None:
    """Lock the folder, waiting up to `PATIENCE_S`; return the descriptor whose closing frees the lock.

    None if the folder cannot be locked, which is printed, or if a signal ended the wait.

    Raises:
        UserError: another process keeps the lock, or the lock's file is a symbolic link.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        try:
            lock = no_follow(str(run_dir / run_folder.LOCK), os.O_RDWR | os.O_CREAT)
            undo.callback(os.close, lock)
            if not _locked(lock, run_dir):
                return None
            _sign(lock)
        except OSError as error:
            if is_disk_full(error):
                raise
            if is_link_error(error):
                raise link_error(run_dir / run_folder.LOCK) from error
            print(f"{run_dir} cannot be locked ({error.strerror}): a second start in it would go unnoticed", flush=True)
            return None
        undo.pop_all()
    return lock


def _locked(lock: int, run_dir: Path) -> bool:
    """Return whether the lock was acquired in time; False if a signal ended the wait."""
    begin, reported = time.monotonic(), False
    while not STOP.is_pending:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in TAKEN:
                raise
        if time.monotonic() - begin > PATIENCE_S:
            raise _refusal(lock, run_dir)
        if not reported:
            holder, reported = _holder(lock), True
            print(f"{holder} is using {run_dir}: waiting up to {PATIENCE_S:.0f} s for it to end", flush=True)
        time.sleep(POLL_S)
    return False


def _refusal(lock: int, run_dir: Path) -> UserError:
    return UserError(
        f"{_holder(lock)} is using {run_dir}: two starts in one folder would overwrite each other's files",
        where="run_dir",
        hint="let it finish, or stop it (a SIGTERM lets it save); for another run choose another name= or run_dir=",
    )


def _sign(lock: int) -> None:
    """Write this process's identity into the locked file."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n"
    os.ftruncate(lock, 0)
    os.pwrite(lock, content.encode(), 0)


def _holder(lock: int) -> str:
    """Return which process holds the lock, from what it has written."""
    try:
        signed = json.loads(os.pread(lock, 4096, 0))
        return in_one_line(f"process {signed['pid']} on {signed['host']} (since {signed['since']})")
    except (ValueError, KeyError, TypeError):
        return "another process"


class _LastingPipe(io.FileIO):
    """A pipe that discards output once nobody reads it."""

    def write(self, content: Any) -> int:
        """Write, or discard."""
        try:
            return super().write(content)
        except BrokenPipeError:
            return len(content)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Keep running inside the with statement if a reader of the output is gone, such as a `tee` after Ctrl-C."""
    with ExitStack() as undo:
        for number, name in ((1, "stdout"), (2, "stderr")):
            stream = getattr(sys, name)
            try:
                piped = stream.fileno() == number and stat.S_ISFIFO(os.fstat(number).st_mode)
            except (OSError, ValueError, AttributeError):  # no real file
                continue
            if piped:
                stream.flush()
                buffer = io.BufferedWriter(_LastingPipe(number, "w", closefd=False))
                lasting = io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)
                setattr(sys, name, lasting)
                undo.callback(setattr, sys, name, stream)
                undo.callback(lasting.flush)
        yield


@contextmanager
def own_folder(config: DictConfig) -> Iterator[Path]:
    """Yield the run's folder; for a `fast_dev_run` a temporary one, so that the run's own is not touched."""
    with ExitStack() as made:
        if config.trainer.get("fast_dev_run"):
            folder = made.enter_context(TemporaryDirectory(prefix="hdm-trial-")) if processes.rank() == 0 else None
            config.run_dir = processes.from_first(folder)
        yield Path(config.run_dir)


@contextmanager
def working(config: DictConfig) -> Iterator[None]:
    """Be one of a run's processes inside the with statement.

    Raises:
        StoppedBySignal: on every process, if one was asked to stop; the first one has said so.
        UserError: a mistake that shows only now; another start is using the folder; the disk is full.
    """
    kind = hardware.accelerator(plain(config, "trainer.accelerator"))
    with lasting_output(), STOP.listening():
        hardware.quiet_libraries()
        several = world.join_group(kind)
        try:
            world.require_even_machines()
            hardware.prepare_host(kind, int(plain(config, "hardware.threads")), processes.world_size())
            with own_folder(config) as run_dir, alone_in(run_dir), ExitStack() as log:
                if processes.rank() == 0:
                    log.enter_context(kept_in(run_dir))
                if plain(config, "hardware.compile_cache"):
                    hardware.keep_compiled(run_dir / run_folder.COMPILED, kind)
                run_folder.check_resume(run_dir, config.resume)  # again: another start may just have ended
                yield
        except StoppedBySignal as stop:
            if processes.rank() == 0:
                print(stop)
            if several:
                dist.destroy_process_group()
            raise
        except Exception as error:
            if (told := _told_as(error)) is not None:
                raise told from error
            raise
        if several:  # not after a failure, where it would wait for processes that are gone
            dist.destroy_process_group()


def _told_as(error: Exception) -> UserError | None:
    """Return the error to show for a full disk, for which each library has its own, a dead data worker or no memory."""
    if is_disk_full(error):
        return disk_full_error(getattr(error, "filename", None) or "run_dir")
    if is_dead_worker(error):
        hint = "free memory, or use fewer: data.num_workers=N; the same command resumes from the last checkpoint"
        return UserError(in_one_line(str(error)), where="data.num_workers", hint=hint)
    return memory_error(error, hint=LESS)
