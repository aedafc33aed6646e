"""Carries the optimizer's moments over from the training before."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.checkpoint_io import read_checkpoint
from hdm_lightning.training.optimization.moments import carry_moments


class CarryMoments(Callback):
    """Begins a fit with the moments of a checkpoint, unless the fit itself is being resumed.

    Rates, decay and betas stay those of the fit.

    Args:
        checkpoint: of the training before, read or not.
    """

    def __init__(self, checkpoint: dict[str, Any] | Path | str) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the moments over."""
        if trainer.global_step == 0:
            read = isinstance(self.checkpoint, dict)
            checkpoint = self.checkpoint if read else read_checkpoint(Path(str(self.checkpoint)), lazily=True)
            carry_moments(checkpoint, trainer.optimizers[0])  # type: ignore[arg-type]
