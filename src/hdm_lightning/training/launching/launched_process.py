"""A process that the launcher has started: it ends with its parent, and tells why it failed exactly once."""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from hdm_lightning.errors import UserError
from hdm_lightning.one_machine import will_meet_at
from hdm_lightning.printable import printable
from hdm_lightning.training.recovery.stop_request import STOP

Worker = Callable[[dict[str, Any]], int]

USER_ERROR_STATUS = 2
PR_SET_PDEATHSIG = 1


def start_worker(meeting: str, worker: Worker, config: dict[str, Any]) -> int:
    """Run the worker in this process, started by `training.launching.launch`; returns its exit status.

    The file `meeting` is where the processes find each other.
    """
    end_with_parent()
    will_meet_at(meeting)
    return run_worker(worker, config)


def run_worker(worker: Worker, config: dict[str, Any]) -> int:
    """Run the worker as one of several processes; returns its exit status.

    A failure ends the process here and now: cleaning up would wait for processes that wait for this one.
    """
    try:
        return worker(config)
    except Exception as error:
        let_the_cause_go_first(error)
        print(told(error), end="", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(USER_ERROR_STATUS if isinstance(error, UserError) else 1)


def end_with_parent() -> None:
    """Let Linux kill this process when its parent dies, so that none goes on alone after a `kill -9`."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def let_the_cause_go_first(error: Exception) -> None:
    """Wait before telling an error, the longer the likelier that it only follows from another process's.

    The launcher ends this process as soon as it sees another one fail, which is then the one that is heard.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(delay_s(error, first=os.environ.get("RANK", "0") == "0"))


def told(error: Exception) -> str:
    """What is said of an error: nothing of a lost connection when this process was being ended anyway."""
    if isinstance(error, UserError):
        return f"error: {error}\n"
    if not lost_connection(error):
        return printable("".join(traceback.format_exception(error)))
    lost = f"process {os.environ.get('RANK', '0')} lost its connection to another: {error}\n"
    return "" if STOP.received else printable(lost)


def lost_connection(error: Exception) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Connection", "peer"))


def delay_s(error: Exception, first: bool) -> float:
    """Seconds to wait: mistakes of the user before other errors, broken connections last."""
    if isinstance(error, UserError):
        return 0.0 if first else 1.0  # often all processes make the same one
    return 4.0 if lost_connection(error) else 2.0
