"""A validation before the first step, whose result is logged, and one after the last."""

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.steps import StepWatcher, validation_metrics


class ValidateAtEnds(StepWatcher, Callback):
    """Logs what a full sanity check measures, and ends the fit with a validation whatever its interval.

    Use it with `Trainer(num_sanity_val_steps=-1)`: Lightning then validates before the first step, not when it resumes,
    but gives the result to nobody. Put it before callbacks that do something at the end of a fit.

    Attributes:
        first: what the validation before the first step logged as `val/…`; empty where there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down what Lightning is about to forget."""
        if trainer.sanity_checking and trainer.num_sanity_val_steps == float("inf"):
            self.first = validation_metrics(trainer)
            for logger in trainer.loggers:
                logger.log_metrics(self.first, step=0)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """At the last step, have Lightning validate, which it does where a fit is about to stop."""
        if step == trainer.max_steps:
            trainer.should_stop = True
