"""Training scalars of an autoencoder, on an axis of samples seen."""

import time

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.steps import StepWatcher, due
from hdm_lightning.training.vae.module import AutoencoderModule


class LogVaeScalars(StepWatcher, Callback):
    """Means of the loss terms, rate and speed, every so many optimizer steps.

    Args:
        every: optimizer steps between two entries.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.latest: dict[str, float] = {}
        self._since = (0.0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._since = (time.perf_counter(), trainer.global_step)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Write where due."""
        assert isinstance(module, AutoencoderModule)
        if not due(step, self.every, trainer.max_steps):
            return
        now, (before, first) = time.perf_counter(), self._since
        self._since = (now, step)
        terms = module.drain_terms()
        self.latest = {f"train/{name}": value for name, value in terms.items()}
        rate = trainer.optimizers[0].param_groups[0]
        self.latest["optimizer/learning_rate"] = float(rate["lr"])
        self.latest["speed/images_per_s"] = (step - first) * module.plan.settings.batch_size / (now - before)
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=step * module.plan.settings.batch_size)
