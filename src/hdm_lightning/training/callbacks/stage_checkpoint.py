"""Training checkpoints by steps, samples and minutes, of which the newest few stay."""

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from hdm_lightning.training.callbacks.steps import (
    SharedClock,
    StepWatcher,
    due,
    last_step,
    steps_between,
    validation_follows,
    validation_metrics,
)
from hdm_lightning.training.checkpoint_io import (
    DAMAGED,
    DamagedCheckpoint,
    checkpoint_path,
    checkpoints_in,
    compare_checksums,
)
from hdm_lightning.whole_files import remove_leftovers


class StageCheckpoint(StepWatcher, ModelCheckpoint):
    """Writes `step-00001234.ckpt` every so many steps, samples or minutes and at the end, and keeps the newest few.

    Where a validation is due at the same step, the checkpoint comes after it, so that a resumed training does not
    repeat it. A `LossGuard` that has found something keeps it off the disk. `Trainer.fit(ckpt_path="last")` takes the
    newest one that is whole.

    Args:
        dirpath: where they go; None as for Lightning's `ModelCheckpoint`.
        every_n_steps: optimizer steps between two; 0 for none by steps.
        every_n_samples: the same in samples of all processes, rounded up to steps.
        every_minutes: minutes after which one is written where none of the above has come round; 0 for none by time.
        keep: how many stay on disk.

    Attributes:
        metrics: what the last validation logged as `val/…`, kept in the checkpoint.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        every_n_steps: int = 0,
        every_n_samples: int = 0,
        every_minutes: float = 20.0,
        keep: int = 2,
    ) -> None:
        StepWatcher.__init__(self)
        ModelCheckpoint.__init__(self, dirpath=dirpath, save_top_k=-1, every_n_train_steps=1)
        self.every_n_steps, self.every_n_samples = every_n_steps, every_n_samples
        self.keep = max(1, keep)
        self.metrics: dict[str, float] = {}
        self._waiting = False
        self._clock = SharedClock(every_minutes)

    @property
    def state_key(self) -> str:
        """A fixed name in the checkpoint."""
        return "StageCheckpoint"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decide on the folder, and clear what a killed process left half-written."""
        with warnings.catch_warnings(action="ignore"):  # that it is not empty: it holds the earlier ones
            super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero and stage == "fit":
            remove_leftovers(self.folder)

    @property
    def folder(self) -> Path:
        """Where the checkpoints go, once a fit has begun or where it was given."""
        assert self.dirpath is not None
        return Path(self.dirpath)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        StepWatcher.on_train_start(self, trainer, pl_module)
        self._waiting = False
        self._clock.begin(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save what a validation that did not take place was waited for."""
        if self._waiting:
            self.save(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act on whole steps."""
        StepWatcher.on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Save where due, or after the validation that is due too."""
        every = steps_between(module, self.every_n_steps, self.every_n_samples)
        if due(step, every, last_step(trainer)) or self._clock.has_run_out(trainer, step):
            self._waiting = validation_follows(trainer)
            if not self._waiting:
                self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was measured, and save what has waited for it."""
        if not trainer.sanity_checking:
            self.metrics = validation_metrics(trainer)
            if self._waiting:
                self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: steps count, not epochs."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, whatever ended the fit."""
        if trainer.global_step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Save now, on every process together; what was saved at this step already stays.

        Returns:
            The file.
        """
        self._waiting = False
        path = checkpoint_path(self.folder, trainer.global_step)
        if trainer.fast_dev_run or trainer.strategy.broadcast(path.exists()):  # type: ignore[attr-defined]
            return path
        for logger in trainer.loggers:  # what was logged before a checkpoint is not logged again by who resumes from it
            logger.save()
        self._save_checkpoint(trainer, str(path))
        self.best_model_path = self.last_model_path = str(path)
        self._clock.restart()
        if trainer.is_global_zero:
            damaged = self.folder.glob(f"step-*{DAMAGED}")
            made_up_for = [old for old in damaged if old.is_file() and old.stem <= path.name]
            for old in [*checkpoints_in(self.folder)[: -self.keep], *made_up_for]:
                old.unlink(missing_ok=True)
        return path

    def state_dict(self) -> dict[str, Any]:
        """The last validation's metrics, for a training that is killed before its end was noted."""
        return {"metrics": dict(self.metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the last validation's metrics."""
        self.metrics = dict(state_dict["metrics"])

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What Lightning takes for `ckpt_path="last"`."""
        if self.dirpath is None:
            return set()
        newest = next((path for path in reversed(checkpoints_in(self.folder)) if _is_whole(path)), None)
        return set() if newest is None else {str(newest)}


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint is as it was written; nothing is set aside, as every process asks."""
    try:
        compare_checksums(path)
    except DamagedCheckpoint:
        return False
    return True
