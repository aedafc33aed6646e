"""Hands the optimizer's moments of one stage to the next."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.optimization.moments import carry_moments


class CarryMoments(Callback):
    """Loads the moments of the stage before, unless the stage itself is being resumed."""

    def __init__(self, previous: dict[str, Any]) -> None:
        self.previous = previous

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the moments over; rates, decay and betas stay the stage's own."""
        if trainer.global_step == 0:
            carry_moments(self.previous, trainer.optimizers[0])
