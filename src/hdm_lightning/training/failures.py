"""How one of several processes ends: with its parent, and with the reason of its failure told exactly once."""

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hdm_lightning.errors import UserError
from hdm_lightning.one_machine import will_meet_at
from hdm_lightning.printable import printable
from hdm_lightning.training.stop_request import STOP
from hdm_lightning.whole_files import write_json

Worker = Callable[[dict[str, Any]], int]

USER_ERROR_STATUS = 2
PR_SET_PDEATHSIG = 1
PATIENCE_S = 4
"""How long a process that has lost another waits to be ended by the launcher, which sees why."""


@dataclass(frozen=True)
class Failure:
    """Why a process has failed.

    Attributes:
        rank: its number.
        kind: `user error`, `error`, or `lost connection`, which only follows from another process's end.
        text: what to tell, whole.
    """

    rank: int
    kind: str
    text: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """The failure that an exception is."""
        rank = int(os.environ.get("RANK", "0"))
        if isinstance(error, UserError):
            return cls(rank, "user error", f"error: {error}\n")
        if lost_connection(error):
            return cls(rank, "lost connection", printable(f"process {rank} lost its connection to another: {error}\n"))
        return cls(rank, "error", printable("".join(traceback.format_exception(error))))

    def importance(self) -> tuple[int, int]:
        """Lowest for the one to tell: a mistake of the user, then other errors, lost connections last."""
        return ("user error", "error", "lost connection").index(self.kind), self.rank


def start_worker(meeting: str, worker: Worker, order: dict[str, Any]) -> int:
    """Run the worker in this process, started by `training.launch`; returns its exit status.

    The file `meeting` is where the processes find each other; the reasons of failures are written beside it.
    """
    end_with_parent()
    will_meet_at(meeting)
    return run_worker(worker, order, Path(meeting).parent)


def run_worker(worker: Worker, order: dict[str, Any], failures: Path | None = None) -> int:
    """Run the worker as one of several processes; returns its exit status.

    A failure ends the process here and now: cleaning up would wait for processes that wait for this one.

    Args:
        worker: what runs.
        order: its argument.
        failures: folder for the reason of a failure, which the parent tells; None tells it here.
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
            wait_to_be_ended()
        os._exit(USER_ERROR_STATUS if failure.kind == "user error" else 1)


def read_failures(folder: Path) -> list[Failure]:
    """The failures of processes in the order in which they are worth telling."""
    found = [Failure(**json.loads(file.read_text())) for file in folder.glob("failure-*.json")]
    return sorted(found, key=Failure.importance)


def end_with_parent() -> None:
    """Let Linux kill this process when its parent dies, so that none goes on alone after a `kill -9`."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def wait_to_be_ended() -> None:
    """Leave it to the launcher to end this process, so that it sees the one first that has died of itself."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE_S)
    signal.pause()


def lost_connection(error: Exception) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Connection", "peer"))
