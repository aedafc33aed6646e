"""Training checkpoints by steps, samples and minutes; the newest few are kept."""

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
    """Writes `step-00001234.ckpt` by steps, samples or minutes and at the end, and keeps the newest few.

    If a validation is due at the same step, the checkpoint is written after it, so that a resumed training does not
    repeat it. Nothing is saved if a `LossGuard` has found a divergence. `Trainer.fit(ckpt_path="last")` loads the
    newest undamaged one.

    Args:
        dirpath: folder of the checkpoints; None as for Lightning's `ModelCheckpoint`.
        every_n_steps: optimizer steps between two checkpoints; 0 disables checkpoints by steps.
        every_n_samples: the same in samples of all processes, rounded up to steps.
        every_minutes: minutes after which one is written if none of the above was due; 0 disables checkpoints by time.
        keep: number of checkpoints to keep.

    Attributes:
        metrics: `val/…` metrics of the last validation, saved in the checkpoint.
    """

    state_key = "StageCheckpoint"

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        every_n_steps: int = 0,
        every_n_samples: int = 0,
        every_minutes: float = 20.0,
        keep: int = 2,
    ) -> None:
        super().__init__(dirpath=dirpath, save_top_k=-1, every_n_train_steps=1)
        self.every_n_steps, self.every_n_samples = every_n_steps, every_n_samples
        self.keep = max(1, keep)
        self.metrics: dict[str, float] = {}
        self._waiting = False
        self._clock = SharedClock(every_minutes)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the folder, and delete partial files left by a killed process."""
        with warnings.catch_warnings(action="ignore"):  # that it is not empty: it contains earlier checkpoints
            super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero and stage == "fit":
            remove_leftovers(self.folder)

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints; set once a fit has started, or by `dirpath`."""
        assert self.dirpath is not None
        return Path(self.dirpath)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._waiting = False
        self._clock.begin(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save the checkpoint that waited for a validation that did not take place."""
        if self._waiting:
            self.save(trainer)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Save if due, but after a validation that is also due."""
        every = steps_between(module, self.every_n_steps, self.every_n_samples)
        if due(step, every, last_step(trainer)) or self._clock.has_run_out(trainer, step):
            self._waiting = validation_follows(trainer)
            if not self._waiting:
                self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the metrics, and save the checkpoint that waited for them."""
        if not trainer.sanity_checking:
            self.metrics = validation_metrics(trainer)
            if self._waiting:
                self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: steps count, not epochs."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end, whatever ended the fit."""
        if trainer.global_step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Save now, on all processes together, unless this step has been saved already.

        Returns:
            Path of the checkpoint.
        """
        self._waiting = False
        path = checkpoint_path(self.folder, trainer.global_step)
        if trainer.fast_dev_run or trainer.strategy.broadcast(path.exists()):  # type: ignore[attr-defined]
            return path
        for logger in trainer.loggers:  # a resumed training does not log again what came before its checkpoint
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
        """Return the last validation's metrics, for a training that is killed before its end is recorded."""
        return {"metrics": dict(self.metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last validation's metrics."""
        self.metrics = dict(state_dict["metrics"])

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Return the checkpoint that Lightning loads for `ckpt_path="last"`."""
        if self.dirpath is None:
            return set()
        newest = next((path for path in reversed(checkpoints_in(self.folder)) if _is_whole(path)), None)
        return set() if newest is None else {str(newest)}


def _is_whole(path: Path) -> bool:
    """Return whether a checkpoint is undamaged; a damaged one is not moved aside, since every process asks."""
    try:
        compare_checksums(path)
    except DamagedCheckpoint:
        return False
    return True
