"""Stops a training whose weights are not finite before they are averaged, measured, drawn or saved."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.errors import UserError
from hdm_lightning.training.callbacks.guard import weights_are_finite
from hdm_lightning.training.callbacks.steps import StepWatcher, due


class RequireFiniteWeights(StepWatcher, Callback):
    """Raises `UserError` on every process alike; it stands before all callbacks that use the weights.

    A loss can be finite and its gradient not, so that the step breaks the weights after the loss was looked at. The
    device is waited for only at the steps at which something uses the weights.

    Args:
        cadences: every how many steps something uses the weights (see `steps.due`).
    """

    def __init__(self, cadences: Sequence[int]) -> None:
        super().__init__()
        self.cadences = tuple(cadences)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Look where the weights are about to be used."""
        if any(due(step, every, trainer.max_steps) for every in self.cadences):
            self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        """Look now.

        Raises:
            UserError: naming the step and what to change.
        """
        if not bool(weights_are_finite(trainer.lightning_module)):
            raise UserError(
                f"the weights are not finite after optimizer step {trainer.global_step}",
                where="stage",
                hint="lower stage.learning_rate or stage.gradient_clip, or those of adversarial; this step was not "
                "saved, and resume=auto continues from the checkpoint before it",
            )
