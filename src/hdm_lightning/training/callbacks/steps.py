"""Base and helpers of callbacks that act once per optimizer step, not once per micro-batch."""

import time
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from hdm_lightning.training.strategies.processes import greatest

EXCHANGE_S = 1.0
"""Seconds between two exchanges of processes on accelerators."""
AnyCallback = TypeVar("AnyCallback", bound=Callback)


class Pace:
    """Decides when the processes exchange something: after every step, or less often if that is costly.

    An exchange waits for the device, which is then idle. Since the processes' clocks differ, they agree in each
    exchange on the step of the next one.

    Args:
        every_s: seconds between two exchanges; None for `EXCHANGE_S` on an accelerator, and every step on a CPU.
    """

    def __init__(self, every_s: float | None = None) -> None:
        self.every_s = every_s
        self._asked_at, self._asked_step, self._ask_at = time.monotonic(), 0, 0

    def restart(self, step: int) -> None:
        """Start at a step, so that the next step has an exchange."""
        self._asked_at, self._asked_step, self._ask_at = time.monotonic(), step, step

    def is_due(self, step: int) -> bool:
        """Return whether the processes have an exchange after this step."""
        return step >= self._ask_at

    def exchange(self, flag: bool, step: int, device: torch.device) -> bool:
        """Return on every process whether the flag is set on any of them; all processes must call this together."""
        every_s = (0.0 if device.type == "cpu" else EXCHANGE_S) if self.every_s is None else self.every_s
        now = time.monotonic()
        step_s = (now - self._asked_at) / max(1, step - self._asked_step)
        ahead = max(1.0, every_s // max(step_s, 1e-9))
        raised, ahead = greatest([float(flag), min(ahead, 10_000.0)], device)
        self._asked_at, self._asked_step, self._ask_at = now, step, step + int(ahead)
        return bool(raised)


class StepWatcher:
    """Mixin for callbacks: calls `on_micro_batch`, and `on_step_end` if that completes an optimizer step."""

    _last_step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the first step, so that a resumed fit does not act on the step it resumes from."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call the methods below."""
        self.on_micro_batch(trainer, pl_module, outputs, batch)
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.on_step_end(trainer, pl_module, trainer.global_step)

    def on_micro_batch(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any) -> None:
        """Act after each micro-batch of this process, before `on_step_end`."""

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Act after optimizer step number `step` (the first is 1)."""


CLOCK_S = 10.0
"""Seconds between two exchanges about the first process's clock."""


class SharedClock:
    """A timer that runs out on all processes together, by the first one's clock.

    Args:
        minutes: minutes until it runs out; 0 for never.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self._begun_at = 0.0
        self._pace = Pace(min(CLOCK_S, self.seconds / 10))

    def begin(self, step: int) -> None:
        """Start the timer at the first step of a fit."""
        self._pace.restart(step)
        self.restart()

    def restart(self) -> None:
        """Restart the timer."""
        self._begun_at = time.monotonic()

    def has_run_out(self, trainer: Trainer, step: int) -> bool:
        """Return whether the time has passed; checked only every few steps, since that takes an exchange."""
        if not self.seconds or not self._pace.is_due(step):
            return False
        passed = trainer.is_global_zero and time.monotonic() - self._begun_at >= self.seconds
        return self._pace.exchange(passed, step, trainer.strategy.root_device)


def last_step(trainer: Trainer) -> int:
    """Return the step that ends the fit, as far as is known: the current one if a budget has just been spent."""
    return trainer.global_step if trainer.should_stop else trainer.max_steps


def steps_between(module: LightningModule, steps: int, samples: int) -> int:
    """Return `steps`, or if that is 0, the number of steps for `samples` of all processes, rounded up."""
    if steps or not samples:
        return steps
    return -(-samples // int(module.samples_per_step))  # type: ignore[arg-type]


def due(step: int, every: int, last: int) -> bool:
    """Return whether an action every `every` steps (0: never) and at the last step is due at `step`."""
    return step == last or (every > 0 and step % every == 0)


def log_now(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Send metrics to every logger, at Lightning's own step, and to other callbacks (`trainer.callback_metrics`)."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.fit_loop.epoch_loop._batches_that_stepped)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def logs_now(trainer: Trainer) -> bool:
    """Return whether Lightning logs at this step (`Trainer(log_every_n_steps=…)`)."""
    return trainer._logger_connector.should_update_logs


def validation_follows(trainer: Trainer) -> bool:
    """Return whether Lightning validates right after the hooks at the end of this training batch."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return fetcher is not None and loop._should_check_val_fx(fetcher)


def validation_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of the validation that is just ending, by name; also those of a sanity check."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def trained_network(module: LightningModule) -> nn.Module:
    """Return `module.network`, or the module itself if it has none."""
    network = getattr(module, "network", None)
    return network if isinstance(network, nn.Module) else module


def samples_trained(trainer: Trainer, module: LightningModule) -> int:
    """Return `module.samples_trained`, or the optimizer steps if the module does not count samples."""
    return int(getattr(module, "samples_trained", trainer.global_step))


def rename_state(checkpoint: dict[str, Any], old: str, name: str) -> None:
    """Copy a callback's state in a checkpoint of an older version from its old name to the current one."""
    if old in checkpoint["callbacks"]:
        checkpoint["callbacks"].setdefault(name, checkpoint["callbacks"][old])


def find_callback(trainer: Trainer, kind: type[AnyCallback]) -> AnyCallback | None:
    """Return the trainer's first callback of a kind, or None."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, kind)), None)
