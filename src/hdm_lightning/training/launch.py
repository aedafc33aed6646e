"""Run a worker function in one process per device, and report once why one of them has failed.

The command's own process stays a thin parent: Lightning's launcher would run the whole Hydra command again in every
process, and torchrun around a Hydra command creates a run folder per process.
"""

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hdm_lightning.errors import UserError
from hdm_lightning.one_machine import meeting_place, will_meet_at
from hdm_lightning.printable import printable
from hdm_lightning.training.stop_request import (
    INTERRUPTED_STATUS,
    SIGNALS,
    STOP,
    STOPPED_STATUS,
    report_interruption,
)
from hdm_lightning.training.world import launched_from_outside
from hdm_lightning.whole_files import write_json

Worker = Callable[[dict[str, Any]], int]

USER_ERROR_STATUS = 2
PR_SET_PDEATHSIG = 1
PATIENCE_S = 4
"""Seconds that a process which has lost another waits for the launcher, which sees the cause, to end it."""


@dataclass(frozen=True)
class Failure:
    """Why a process has failed.

    Attributes:
        rank: rank of the process.
        kind: `user error`, `error`, or `lost connection`, which is only a consequence of another process's end.
        text: the whole message.
    """

    rank: int
    kind: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Return the failure for an exception."""
        rank = int(os.environ.get("RANK", "0"))
        if isinstance(error, UserError):
            return cls(rank, "user error", f"error: {error}\n")
        if lost_connection(error):
            return cls(rank, "lost connection", printable(f"process {rank} lost its connection to another: {error}\n"))
        return cls(rank, "error", printable("".join(traceback.format_exception(error))))

    def importance(self) -> tuple[int, int]:
        """Return a sort key, lowest for the failure to report: user errors, other errors, then lost connections."""
        return ("user error", "error", "lost connection").index(self.kind), self.rank


def start_worker(meeting: str, worker: Worker, order: dict[str, Any]) -> int:
    """Run the worker in this process, started by `training.launch`, and return its exit status.

    The processes meet at the file `meeting`; the reasons of failures are written beside it.
    """
    end_with_parent()
    will_meet_at(meeting)
    return run_worker(worker, order, Path(meeting).parent)


def run_worker(worker: Worker, order: dict[str, Any], failures: Path | None = None) -> int:
    """Run the worker as one of several processes and return its exit status.

    A failure exits the process at once: cleaning up would wait for processes that wait for this one.

    The reason is written to the folder `failures`, for the parent to report, or reported here if that is None.
    """
    try:
        return worker(order)
    except Exception as error:
        failure = Failure.of(error)
        if failures is not None:
            write_json(failures / f"failure-{failure.rank}.json", asdict(failure))
        elif failure.kind != "lost connection" or not STOP.received:
            print(failure.text, end="", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if failure.kind == "lost connection":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE_S)
        os._exit(USER_ERROR_STATUS if failure.kind == "user error" else 1)


def read_failures(folder: Path) -> list[Failure]:
    """Return the failures of the processes, the one to report first."""
    found = [Failure(**json.loads(file.read_text())) for file in folder.glob("failure-*.json")]
    return sorted(found, key=Failure.importance)


def end_with_parent() -> None:
    """Make Linux kill this process when its parent dies, so that none keeps running after a `kill -9`."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def lost_connection(error: Exception) -> bool:
    """Return whether an error means that another process is gone."""
    said_by_gloo = type(error) is RuntimeError and any(word in str(error) for word in ("gloo", "Connection", "peer"))
    return isinstance(error, dist.DistError) or said_by_gloo


SHUTDOWN_S = 25


def launch(worker: Worker, order: dict[str, Any], processes: int) -> int:
    """Run `worker(order)` in `processes` processes on this machine and return the exit status.

    One process, or processes started by torchrun or SLURM, run the worker right here. The worker must be importable and
    the order plain, since other processes receive both by pickling.

    SIGTERM, SIGUSR1 and Ctrl-C are passed on to the processes, which save and stop in their own time; a second Ctrl-C
    ends them. When one of them dies, the others are ended.

    Raises:
        UserError: a process died; names which, and why. A process started by torchrun or SLURM reports its own error
            and exits.
    """
    if launched_from_outside() and os.environ.get("WORLD_SIZE") != "1":
        return run_worker(worker, order)
    if processes == 1 or launched_from_outside():
        return worker(order)
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the cause is reported below, once
    with meeting_place() as place, _ctrl_c_for_this_process_alone(), signals_passed_on() as passed_on:
        try:
            start = elastic_launch(_launch_config(processes, place / "rendezvous"), start_worker)
            statuses = start(str(place / "group"), worker, order)
            status = max(statuses.values(), default=0)
        except ChildFailedError as failure:
            if passed_on.count(signal.SIGINT) > 1:
                return INTERRUPTED_STATUS
            status = _status_of(failure, place, stopped=bool(passed_on))
        except SignalException as interruption:
            return 128 + int(interruption.sigval)
    return INTERRUPTED_STATUS if status == STOPPED_STATUS and signal.SIGINT in passed_on else status


def _launch_config(processes: int, rendezvous: Path) -> LaunchConfig:
    """Return the settings to start `processes` processes on this machine, which meet by a file."""
    patience: dict[str, Any] = {}
    if "shutdown_timeout" in {each.name for each in fields(LaunchConfig)}:  # since torch 2.12; 30 seconds before
        patience["shutdown_timeout"] = SHUTDOWN_S
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        run_id=uuid.uuid4().hex,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint=str(rendezvous),
        rdzv_configs={"store_type": "file"},
        local_addr="localhost",
        max_restarts=0,
        start_method="spawn",
        monitor_interval=0.2,
        signals_to_handle="SIGHUP,SIGQUIT",
        **patience,
    )


@contextmanager
def _ctrl_c_for_this_process_alone() -> Iterator[None]:
    """Block in the workers, which inherit the mask, the SIGINT that a terminal sends to every process.

    They then receive each Ctrl-C once, from this process, even while they are still importing.
    """
    resource_tracker.ensure_running()  # starting later, it would lift the mask
    done = threading.Event()
    ears = threading.Thread(target=done.wait, daemon=True)
    ears.start()  # unmasked: it receives the signal, and the main thread runs the handler
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()


@contextmanager
def signals_passed_on() -> Iterator[list[int]]:
    """Pass signals on to this process's workers inside the with statement; yield those received.

    Ctrl-C reaches them as SIGTERM, a second one as SIGKILL.
    """
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        workers = multiprocessing.active_children()
        if number == signal.SIGINT:
            if not workers:
                raise KeyboardInterrupt
            if came.count(signal.SIGINT) > 1:
                number = signal.SIGKILL
            else:
                number = signal.SIGTERM
                report_interruption()
        if not workers:  # none has been started yet
            raise SystemExit(STOPPED_STATUS)
        for process in workers:
            assert process.pid is not None
            os.kill(process.pid, number)

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _status_of(failure: ChildFailedError, place: Path, *, stopped: bool) -> int:
    """Report the most important reason of the failed processes and return the exit status.

    Raises:
        UserError: which process has died, and why.
    """
    rank, first = failure.get_first_failure()
    status = int(first.exitcode)
    reasons = [reason for reason in read_failures(place) if reason.kind != "lost connection" or not stopped]
    if reasons and (status > 0 or reasons[0].kind != "lost connection"):
        print(reasons[0].text, end="", file=sys.stderr, flush=True)
        rank = reasons[0].rank
        status = USER_ERROR_STATUS if reasons[0].kind == "user error" else max(status, 1)
    if status in (2, STOPPED_STATUS):
        return status
    if -status in SIGNALS:  # before it could listen, so there was nothing to save
        return STOPPED_STATUS
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
    hint = "see the messages above"
    if status == -signal.SIGKILL:
        hint = "if nobody sent the signal, the machine ran out of memory: check the kernel log"
    raise UserError(
        f"process {rank} of the run {how}, and the others were stopped" + (" while stopping" if stopped else ""),
        where="training",
        hint=f"{hint}; the same command continues from the last checkpoint",
    ) from failure
