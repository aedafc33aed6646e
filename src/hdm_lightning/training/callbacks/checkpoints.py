"""Training checkpoints of a stage: when they are written and which are kept."""

import re
import time
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.steps import StepWatcher, due, last_step
from hdm_lightning.training.settings import CheckpointSettings
from hdm_lightning.whole_files import remove_leftovers

PATTERN = re.compile(r"step-(\d{8})\.ckpt")
SET_ASIDE = ".damaged"
"""Ending of a checkpoint that was found damaged; see `recovery.intact`."""


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
        settings: how many stay on disk, and after how many minutes one is overdue (see `callbacks.signals`).
        before: called on every process before anything is written; what it raises keeps the checkpoint off the disk.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        settings: CheckpointSettings,
        before: Callable[[Trainer], None] | None = None,
    ) -> None:
        super().__init__()
        self.before = before
        self.folder = folder
        self.every = every
        self.keep = max(1, settings.keep)
        self.longest_s = 60 * settings.every_minutes
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear what a killed process left half-written."""
        super().on_train_start(trainer, pl_module)
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            remove_leftovers(self.folder)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Save where due."""
        if due(step, self.every, last_step(trainer)):
            self.save(trainer)

    def is_overdue(self) -> bool:
        """Whether more than the longest time has passed on this process since a checkpoint was written."""
        return 0 < self.longest_s <= time.monotonic() - self._saved_at

    def save(self, trainer: Trainer) -> None:
        """Save now, on every process together; what was saved at this step already stays."""
        path = checkpoint_path(self.folder, trainer.global_step)
        if trainer.strategy.broadcast(path.exists()):
            return
        if self.before is not None:
            self.before(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            set_aside = [old for old in self.folder.glob(f"step-*{SET_ASIDE}") if old.is_file()]
            made_up_for = [old for old in set_aside if old.stem <= path.name]
            for old in [*checkpoints_in(self.folder)[: -self.keep], *made_up_for]:
                old.unlink(missing_ok=True)
