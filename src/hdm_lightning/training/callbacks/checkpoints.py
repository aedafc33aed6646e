"""Training checkpoints of a stage: when they are written and which are kept."""

import re
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.steps import StepWatcher, due, last_step
from hdm_lightning.training.checkpoint_io import remove_leftovers

PATTERN = re.compile(r"step-(\d{8})\.ckpt")


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint after `step` optimizer steps."""
    return folder / f"step-{step:08d}.ckpt"


def checkpoints_in(folder: Path) -> list[Path]:
    """The stage's checkpoints, oldest first. Each is whole: files appear under their name only when written."""
    return sorted(path for path in folder.glob("step-*.ckpt") if PATTERN.fullmatch(path.name))


class SaveCheckpoints(StepWatcher, Callback):
    """Writes a checkpoint every so many optimizer steps and at the end, and keeps the newest few.

    Args:
        folder: where they go.
        every: optimizer steps between two; 0 means the end only.
        keep: how many stay on disk.
        before: called on every process before anything is written; what it raises keeps the checkpoint off the disk.
    """

    def __init__(self, folder: Path, every: int, keep: int, before: Callable[[Trainer], None] | None = None) -> None:
        super().__init__()
        self.before = before
        self.folder = folder
        self.every = every
        self.keep = max(1, keep)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear what a killed process left half-written."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            remove_leftovers(self.folder)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Save where due."""
        if due(step, self.every, last_step(trainer)):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now, on every process together; what was saved at this step already stays."""
        path = checkpoint_path(self.folder, trainer.global_step)
        if trainer.strategy.broadcast(path.exists()):
            return
        if self.before is not None:
            self.before(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            for old in checkpoints_in(self.folder)[: -self.keep]:
                old.unlink(missing_ok=True)
