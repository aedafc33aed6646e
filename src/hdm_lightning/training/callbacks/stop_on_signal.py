"""On SIGTERM, SIGUSR1 and Ctrl-C, finish the step, save and exit, on all processes together."""

from contextlib import ExitStack
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from hdm_lightning.training.callbacks.stage_checkpoint import StageCheckpoint
from hdm_lightning.training.callbacks.steps import Pace, StepWatcher, last_step
from hdm_lightning.training.stop_request import STOP
from hdm_lightning.training.strategies.processes import gathered


class StoppedBySignal(SystemExit):
    """The training was asked to stop and has saved.

    If it is not caught, the process exits with status 143, or 130 after Ctrl-C.

    Attributes:
        message: human-readable message.
        checkpoint: path of the saved checkpoint, or None if nothing was saved.
    """

    def __init__(self, message: str, checkpoint: Path | None = None) -> None:
        super().__init__(STOP.status)
        self.message = message
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return self.message


class StopOnSignal(StepWatcher, Callback):
    """Stops all processes at the end of an optimizer step or a validation when any of them gets a signal.

    On accelerators the processes check about once a second, and at the end of every validation and fit.
    Saves through the trainer's first checkpoint callback, then raises `StoppedBySignal`. A second Ctrl-C ends the
    process at once. Lightning's own handlers are disabled, since its broadcast on SIGTERM waits forever for processes
    that did not get the signal. Put it last.

    Args:
        every_s: seconds between two checks; None for every step on a CPU, and one second elsewhere.
    """

    def __init__(self, every_s: float | None = None) -> None:
        self._listening = ExitStack()
        self._pace = Pace(every_s)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen for signals, unless the process does so already."""
        if stage == "fit":
            trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
            # Lightning would broadcast before every batch whether those handlers have seen a signal, and the host would
            # wait for the device to read the result.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
            if not STOP.is_listening:
                self._listening.enter_context(STOP.listening())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        self._listening.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._listening.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if a signal came while the training was being set up."""
        super().on_train_start(trainer, pl_module)
        self._pace.restart(trainer.global_step)
        stop_if_asked("before the first step")

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Save and stop on all processes if any was asked to stop."""
        if self._pace.is_due(step) or step == last_step(trainer):
            self._look(trainer, module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and stop if asked, since a step may take long."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        if self._pace.exchange(STOP.is_pending, trainer.global_step, module.device):
            path, step = save_now(trainer), trainer.global_step
            raise StoppedBySignal(f"interrupted; the same command resumes from step {step}", path)


def save_now(trainer: Trainer) -> Path | None:
    """Write a checkpoint through the trainer's first checkpoint callback; all processes must call this together."""
    callback = trainer.checkpoint_callback
    if isinstance(callback, StageCheckpoint):
        return callback.save(trainer)
    folder = getattr(callback, "dirpath", None)
    if folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    path = Path(folder) / f"stopped-step={trainer.global_step}.ckpt"
    trainer.save_checkpoint(path)
    return path


def stop_if_asked(when: str) -> None:
    """Stop all processes if any was asked to stop while nothing was being trained.

    Raises:
        StoppedBySignal: a process was asked to stop; raised on every process.
    """
    if any(gathered(STOP.is_pending)):
        raise StoppedBySignal(f"interrupted {when}; the same command resumes from there")
