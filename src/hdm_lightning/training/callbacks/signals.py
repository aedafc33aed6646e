"""SIGTERM and SIGUSR1: finish the step, save, and leave with status 143, all processes together."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.steps import StepWatcher
from hdm_lightning.training.processes import any_process

EXIT_STATUS = 143
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StoppedBySignal(Exception):
    """The run was asked to stop and has saved; the command exits with status 143."""


class StopOnSignal(StepWatcher, Callback):
    """Turns a signal to any one process into a common stop at the end of an optimiser step.

    The handlers only set a flag: Lightning's own handler acts on the process that got the signal and
    leaves the others waiting in a collective.

    Args:
        save: called on every process before stopping.
    """

    def __init__(self, save: Callable[[Trainer], None]) -> None:
        super().__init__()
        self.save = save
        self.received = False
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers, over those that Lightning has just installed."""
        super().on_train_start(trainer, pl_module)
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Stop everywhere if any process was told to."""
        if any_process(self.received, module.device):
            self.save(trainer)
            raise StoppedBySignal(f"stopped by a signal after step {step}; resume=auto continues")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
