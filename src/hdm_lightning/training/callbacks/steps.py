"""Callbacks that act once per optimizer step, not once per micro-batch."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer


class StepWatcher:
    """Mixin for callbacks: calls `on_step_end` after each micro-batch that completed an optimizer step."""

    def __init__(self) -> None:
        self._last_step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the fit starts, so that a resumed fit does not act on the step it resumes from."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pass on the end of a step."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.on_step_end(trainer, pl_module, trainer.global_step)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Act after optimizer step number `step` (1 is the first)."""


def last_step(trainer: Trainer) -> int:
    """The step that ends the fit, as far as is known: the present one where a budget has just been spent."""
    return trainer.global_step if trainer.should_stop else trainer.max_steps


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: never) and at the last step is due at `step`."""
    return step == last or (every > 0 and step % every == 0)
