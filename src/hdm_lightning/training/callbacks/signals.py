"""SIGTERM and SIGUSR1: finish the step, save, and leave with status 143, all processes together."""

from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.steps import StepWatcher
from hdm_lightning.training.processes import any_process, gathered
from hdm_lightning.training.recovery.stop_request import STOP

EXIT_STATUS = 143


class StoppedBySignal(Exception):
    """The run was asked to stop and has saved; the command exits with status 143."""


class StopOnSignal(StepWatcher, Callback):
    """Turns a signal to any one process into a common stop at the end of an optimizer step.

    Args:
        save: called on every process before stopping.
    """

    def __init__(self, save: Callable[[Trainer], None]) -> None:
        super().__init__()
        self.save = save

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Stop everywhere if any process was told to."""
        if any_process(STOP.received, module.device):
            self.save(trainer)
            raise StoppedBySignal(f"stopped by a signal after step {step}; resume=auto continues")


def stop_between_fits() -> None:
    """Stop everywhere if any process was told to while no fit was running.

    Raises:
        StoppedBySignal: on every process alike.
    """
    if any(gathered(STOP.received)):
        raise StoppedBySignal("stopped by a signal before a stage began; resume=auto continues")
