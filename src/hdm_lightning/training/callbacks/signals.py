"""The end of a step, as all processes agree on it: stop after SIGTERM, SIGUSR1 or Ctrl-C; save when it is time."""

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.checkpoints import SaveCheckpoints
from hdm_lightning.training.callbacks.steps import StepWatcher
from hdm_lightning.training.processes import any_of_each, gathered
from hdm_lightning.training.stop_request import STOP


class StoppedBySignal(Exception):
    """The run was asked to stop and has saved; the command exits with status 143, or 130 after Ctrl-C."""


class StopOnSignal(StepWatcher, Callback):
    """Turns a signal to any one process, or the first one's clock, into a common act at the end of an optimizer step.

    A signal saves and stops; a checkpoint that is overdue is written. Both are agreed on in one exchange.

    Args:
        save: writes the checkpoints.
    """

    def __init__(self, save: SaveCheckpoints) -> None:
        super().__init__()
        self.save = save

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Save and stop everywhere if any process was told to; save where the first process finds it overdue."""
        overdue = trainer.is_global_zero and self.save.is_overdue()
        stop, overdue = any_of_each([STOP.received, overdue], module.device)
        if stop or overdue:
            self.save.save(trainer)
        if stop:
            raise StoppedBySignal(f"interrupted; the same command goes on from step {step}")


def stop_between_fits() -> None:
    """Stop everywhere if any process was told to while no fit was running.

    Raises:
        StoppedBySignal: on every process alike.
    """
    if any(gathered(STOP.received)):
        raise StoppedBySignal("interrupted before a stage began; the same command goes on from there")
