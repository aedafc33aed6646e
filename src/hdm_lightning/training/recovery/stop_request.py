"""SIGTERM and SIGUSR1 as a flag of the process, from its first import to its end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process has been asked to stop.

    The handlers set a flag and do nothing else: what stops the processes of a run together must be decided by all
    of them at the same place (see `callbacks.signals`).
    """

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen inside the with statement, the flag down at first; afterwards the former handlers are back."""
        self.received = False
        previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


STOP = StopRequest()
"""The request of this process: signals belong to a process, so there is one."""


def without_own_signals(trainer: "Trainer") -> "Trainer":
    """The trainer, which leaves the handlers alone: its own broadcast on SIGTERM waits for ever for processes
    that did not get the signal."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer
