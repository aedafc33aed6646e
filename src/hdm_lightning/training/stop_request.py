"""SIGTERM, SIGUSR1 and Ctrl-C as a flag of the process, from its first import to its end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from hdm_lightning.training.world import launched_from_outside

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED_STATUS, INTERRUPTED_STATUS = 143, 130
"""How a command ends that a signal has stopped, and one that Ctrl-C has."""


class StopRequest:
    """Whether this process has been asked to stop.

    The handlers set a flag and do nothing else: what stops the processes of a run together must be decided by all
    of them at the same place (see `callbacks.stop_on_signal`). A second Ctrl-C does not wait for that.

    Attributes:
        received: whether a signal came.
        interrupted: whether it was Ctrl-C.
        is_listening: whether the handlers are in place.
    """

    def __init__(self) -> None:
        self.received = self.interrupted = self.is_listening = False

    @property
    def is_pending(self) -> bool:
        """Whether a signal came to what listens now; `received` stays up afterwards."""
        return self.is_listening and self.received

    @property
    def status(self) -> int:
        """The exit status of a command that has been asked to stop."""
        return INTERRUPTED_STATUS if self.interrupted else STOPPED_STATUS

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen inside the with statement, the flag down at first; afterwards the former handlers are back."""
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
    """Say what a first Ctrl-C does; safe in a handler, which may have come in the middle of another print."""
    if os.environ.get("RANK", "0") != "0":
        return
    with suppress(OSError):  # the same Ctrl-C has ended the `tee` that read it
        os.write(2, b"\ninterrupted: finishing the step and saving; Ctrl-C again ends at once\n")


STOP = StopRequest()
"""The request of this process: signals belong to a process, so there is one."""
