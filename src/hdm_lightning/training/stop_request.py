"""Turn SIGTERM, SIGUSR1 and Ctrl-C into a flag of the process."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from hdm_lightning.training.world import launched_from_outside

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED_STATUS, INTERRUPTED_STATUS = 143, 130
"""Exit statuses of a command stopped by a signal and by Ctrl-C."""


class StopRequest:
    """Whether this process has been asked to stop.

    The handlers only set a flag: the processes of a run must all decide at the same place to stop together (see
    `callbacks.stop_on_signal`). A second Ctrl-C does not wait for that.

    Attributes:
        received: whether a signal came.
        interrupted: whether it was Ctrl-C.
        is_listening: whether the handlers are in place.
    """

    def __init__(self) -> None:
        self.received = self.interrupted = self.is_listening = False

    @property
    def is_pending(self) -> bool:
        """Whether a signal came while the handlers are in place; `received` stays set afterwards."""
        return self.is_listening and self.received

    @property
    def status(self) -> int:
        """The exit status of a command that has been asked to stop."""
        return INTERRUPTED_STATUS if self.interrupted else STOPPED_STATUS

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Clear the flag and listen inside the with statement; restore the former handlers afterwards."""
        self.received = self.interrupted = False
        self.is_listening = True
        previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            self.is_listening = False
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted and not launched_from_outside():  # torchrun repeats what the terminal has sent
                os._exit(INTERRUPTED_STATUS)
            self.interrupted = True
            report_interruption()
        self.received = True


def report_interruption() -> None:
    """Print what a first Ctrl-C does; safe in a handler, which may interrupt another print."""
    if os.environ.get("RANK", "0") != "0":
        return
    with suppress(OSError):  # the same Ctrl-C has ended the `tee` that reads it
        os.write(2, b"\ninterrupted: finishing the step and saving; Ctrl-C again ends at once\n")


STOP = StopRequest()
"""The request of this process: signals belong to a process, so there is one."""
