"""What ends a stage early: its wall-clock or cost budget, or a validation loss that no longer falls."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.ledger import KeepLedger
from hdm_lightning.training.callbacks.steps import StepWatcher
from hdm_lightning.training.callbacks.validation import ValidateFlow
from hdm_lightning.training.processes import from_first
from hdm_lightning.training.settings import StopSettings


class StopStage(StepWatcher, Callback):
    """Ends the stage, on all processes together, when one of its budgets is spent.

    It comes before all callbacks that do something at a stage's end, so that they see that this step is the last one.

    Args:
        settings: the budgets.
        ledger: knows the time and cost so far.
        validation: knows the latest validation losses.
        batch_size: samples per optimizer step.
    """

    def __init__(self, settings: StopSettings, ledger: KeepLedger, validation: ValidateFlow, batch_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.ledger = ledger
        self.validation = validation
        self.batch_size = batch_size
        self.reason: str | None = None
        self.best = math.inf
        self.best_samples = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A stage that had ended, and was killed before that was noted, takes no further step."""
        trainer.should_stop = self.reason is not None

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Stop where a budget is spent; the first process decides, since clocks differ."""
        settings = self.settings
        if settings.max_hours is settings.max_cost_usd is settings.plateau_samples is None:
            return
        self.reason = from_first(self._spent(step * self.batch_size))
        if self.reason:
            trainer.should_stop = True

    def _spent(self, samples: int) -> str | None:
        settings, hours, cost = self.settings, self.ledger.stage_seconds() / 3600, self.ledger.stage_cost_usd()
        if settings.max_hours is not None and hours >= settings.max_hours:
            return f"max_hours {settings.max_hours:g} reached"
        if settings.max_cost_usd is not None and cost >= settings.max_cost_usd:
            return f"max_cost_usd {settings.max_cost_usd:g} reached"
        if settings.plateau_samples is not None and self._flat(samples):
            return f"no improvement over {settings.plateau_samples} samples"
        return None

    def _flat(self, samples: int) -> bool:
        loss = min(self.validation.latest.values(), default=math.inf)
        if loss < self.best - self.settings.plateau_delta:
            self.best, self.best_samples = loss, samples
        return samples - self.best_samples >= (self.settings.plateau_samples or math.inf)

    def state_dict(self) -> dict[str, Any]:
        """The best loss so far and where it was, and what has ended the stage."""
        return {"best": self.best, "best_samples": self.best_samples, "reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best loss so far."""
        self.best, self.best_samples = state_dict["best"], state_dict["best_samples"]
        self.reason = state_dict.get("reason")
