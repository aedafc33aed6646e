"""The run's ledger: one JSON line per event, across restarts."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.keep_ledger import Ledger
from hdm_lightning.training.callbacks.memory_use import memory_gb
from hdm_lightning.training.callbacks.steps import StepWatcher, due, last_step
from hdm_lightning.training.stages import StagePlan

__all__ = ["KeepLedger", "Ledger"]

LONGEST_SILENCE_S = 300.0
"""What a `kill -9` between two checkpoints may hide of the time and the money spent."""


class KeepLedger(StepWatcher, Callback):
    """Writes the ledger's lines of one stage: start, progress at every checkpoint and every few minutes, end.

    Args:
        ledger: the run's ledger.
        plan: the stage.
        every: optimizer steps between progress lines.
        usd_per_device_hour: price of a device.
    """

    def __init__(self, ledger: Ledger, plan: StagePlan, every: int, usd_per_device_hour: float) -> None:
        super().__init__()
        self.ledger = ledger
        self.plan = plan
        self.every = every
        self.usd_per_device_hour = usd_per_device_hour
        self.before_device_hours, self.before_usd = ledger.device_hours_spent(), ledger.cost_spent_usd()
        self.stage_before_s, self.stage_before_usd = ledger.seconds_spent(plan.name), ledger.cost_spent_usd(plan.name)
        self._mark = self._begin = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the start, or the restart."""
        super().on_train_start(trainer, pl_module)
        self._mark = self._begin = time.monotonic()
        restarts = self.ledger.starts(self.plan.name)
        samples = trainer.global_step * self.plan.settings.batch_size
        self.ledger.append(
            "start", stage=self.plan.name, samples=samples, restarts=restarts, devices=self.plan.world_size
        )

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Note progress where due."""
        silent_s = time.monotonic() - self._mark
        if due(step, self.every, last_step(trainer)) or silent_s >= LONGEST_SILENCE_S:
            self.note("progress", trainer, module)

    def note(self, event: str, trainer: Trainer, module: LightningModule, **values: Any) -> None:
        """Append a line with what was spent since the last one, and further values.

        The peak of memory is that of the first process: of its device, or of the host where it computes on a CPU.
        """
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        hours = seconds * self.plan.world_size / 3600
        memory = memory_gb(trainer.strategy.root_device)  # the module may be back on the CPU
        self.ledger.append(
            event,
            stage=self.plan.name,
            samples=trainer.global_step * self.plan.settings.batch_size,
            seconds=round(seconds, 3),
            device_hours=round(hours, 6),
            cost_usd=round(hours * self.usd_per_device_hour, 6),
            peak_memory_gb=round(memory.get("device_peak", memory["host_peak"]), 3),
            **values,
        )

    def stage_seconds(self) -> float:
        """Wall-clock seconds of the stage so far, restarts included."""
        return self.stage_before_s + time.monotonic() - self._begin

    def device_hours(self) -> float:
        """Hours of the whole run so far, times the devices, restarts included."""
        return self.before_device_hours + self._device_hours_now()

    def cost_usd(self) -> float:
        """Dollars of the whole run so far, restarts included."""
        return self.before_usd + self._device_hours_now() * self.usd_per_device_hour

    def stage_cost_usd(self) -> float:
        """Dollars of the stage so far, restarts included."""
        return self.stage_before_usd + self._device_hours_now() * self.usd_per_device_hour

    def _device_hours_now(self) -> float:
        return (time.monotonic() - self._begin) / 3600 * self.plan.world_size
