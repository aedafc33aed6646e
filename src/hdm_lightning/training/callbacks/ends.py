"""Start and end a fit with a validation, and end it early when a budget is spent or the loss stops falling."""

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn

from hdm_lightning.errors import UserError
from hdm_lightning.training.callbacks.keep_ledger import KeepLedger
from hdm_lightning.training.callbacks.steps import Pace, StepWatcher, find_callback, samples_trained, validation_metrics
from hdm_lightning.training.strategies.processes import from_first


class ValidateAtEnds(StepWatcher, Callback):
    """Logs the metrics of a full sanity check, and ends the fit with a validation whatever its interval.

    Use it with `Trainer(num_sanity_val_steps=-1)`: Lightning then validates before the first step (not when it
    resumes) but discards the result. Put it before callbacks that act at the end of a fit.

    Attributes:
        first: `val/…` metrics of the validation before the first step; empty if there was none.
    """

    def __init__(self) -> None:
        self.first: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sanity check's metrics, which Lightning is about to discard."""
        if trainer.sanity_checking and trainer.num_sanity_val_steps == float("inf"):
            self.first = validation_metrics(trainer)
            for logger in trainer.loggers:
                logger.log_metrics(self.first, step=0)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """At the last step, make Lightning validate, as it does when a fit is about to stop."""
        if step == trainer.max_steps:
            trainer.should_stop = True


class Budget(StepWatcher, Callback):
    """Ends the fit, on all processes together, when a budget of hours or dollars is spent, restarts included.

    Lightning then validates once more, and checkpoint callbacks save. Put it first, so that the others see that this
    step is the last one. A `KeepLedger` among the callbacks keeps the count; without one, the checkpoint does.

    Args:
        max_hours: wall-clock hours.
        max_cost_usd: dollars.
        usd_per_device_hour: price of a device, used without a `KeepLedger`.
        every_s: seconds between two checks of the clock; None for every step on a CPU, and one second elsewhere.

    Attributes:
        reason: why the fit was ended, or None.
    """

    def __init__(
        self,
        max_hours: float | None = None,
        max_cost_usd: float | None = None,
        *,
        usd_per_device_hour: float = 0.0,
        every_s: float | None = None,
    ) -> None:
        for where, value in (("max_hours", max_hours), ("max_cost_usd", max_cost_usd)):
            if value is not None and not value > 0:
                hint = "set a positive value or null"
                raise UserError(f"{value} is not positive", where=f"callbacks.budget.{where}", hint=hint)
        self.max_hours, self.max_cost_usd, self.usd_per_device_hour = max_hours, max_cost_usd, usd_per_device_hour
        self.reason: str | None = None
        self._ledger: KeepLedger | None = None
        self._before_s, self._begin = 0.0, time.monotonic()
        self._pace = Pace(every_s)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the ledger, if there is one."""
        self._ledger = find_callback(trainer, KeepLedger)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take no further step in a fit that had ended but was killed before its end was recorded."""
        trainer.should_stop = trainer.should_stop or self.reason is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._begin = time.monotonic()
        self._pace.restart(trainer.global_step)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Stop if the budget is spent; the first process decides, since clocks differ."""
        if (self.max_hours is None and self.max_cost_usd is None) or not self._pace.is_due(step):
            return
        spent = self._spent(trainer.world_size) if trainer.is_global_zero else None
        if self._pace.exchange(spent is not None, step, module.device):
            self.reason = from_first(spent)
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return why the fit was ended, and the seconds so far."""
        return {"reason": self.reason, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the reason and the seconds."""
        self.reason, self._before_s = state_dict["reason"], float(state_dict["seconds"])

    def _seconds(self) -> float:
        return self._before_s + time.monotonic() - self._begin

    def _spent(self, devices: int) -> str | None:
        if self._ledger is not None:
            seconds, usd = (self._ledger.spent(key, stage=True) for key in ("seconds", "cost_usd"))
        else:
            seconds = self._seconds()
            usd = seconds / 3600 * devices * self.usd_per_device_hour
        if self.max_hours is not None and seconds / 3600 >= self.max_hours:
            return f"max_hours {self.max_hours:g} reached"
        if self.max_cost_usd is not None and usd >= self.max_cost_usd:
            return f"max_cost_usd {self.max_cost_usd:g} reached"
        return None


class PlateauStopping(EarlyStopping):
    """Ends the fit when a validation loss has not improved over a number of samples.

    Lightning's `EarlyStopping` with its patience in samples instead of validations. It takes the lowest of the metrics
    whose names start with `monitor`, so the losses of weight averages count too.

    Args:
        samples: samples without an improvement.
        monitor: start of the metrics' names.
        min_delta: smallest improvement that counts.
        kwargs: further arguments of `EarlyStopping`.

    Attributes:
        reason: why the fit was ended, or None.
    """

    state_key = "PlateauStopping"

    def __init__(self, samples: int, *, monitor: str = "val/loss", min_delta: float = 0.0, **kwargs: Any) -> None:
        super().__init__(monitor=monitor, min_delta=min_delta, **kwargs)
        if not samples > 0:
            raise UserError(
                f"{samples} is not positive", where="callbacks.plateau.samples", hint="set 1 or more, or null"
            )
        if not min_delta >= 0:
            raise UserError(f"{min_delta} is not 0 or more", where="callbacks.plateau.min_delta", hint="set 0 or more")
        self.samples = samples
        self.reason: str | None = None
        self.best = math.inf
        self.best_samples = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take no further step in a fit that had ended but was killed before its end was recorded."""
        trainer.should_stop = trainer.should_stop or self.reason is not None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: validations count, not epochs."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the best loss so far; the validation before the first step does not count."""
        metrics = [value for name, value in validation_metrics(trainer).items() if name.startswith(self.monitor)]
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not metrics:
            return
        samples = samples_trained(trainer, pl_module)
        if min(metrics) < self.best - abs(self.min_delta):
            self.best, self.best_samples = min(metrics), samples
        if samples - self.best_samples >= self.samples:
            self.reason = f"no improvement over {self.samples} samples"
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the best loss so far, its position, and why the fit was ended."""
        return {"best": self.best, "best_samples": self.best_samples, "reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore these values."""
        self.best, self.best_samples = float(state_dict["best"]), int(state_dict["best_samples"])
        self.reason = state_dict["reason"]


def plateau_stopping(samples: int | None, **settings: Any) -> PlateauStopping | None:
    """Return a `PlateauStopping`, or None if `samples` is None.

    Args:
        samples: samples without an improvement of the validation loss; None never ends the fit.
        settings: further arguments of `PlateauStopping`.
    """
    return None if samples is None else PlateauStopping(samples, **settings)
