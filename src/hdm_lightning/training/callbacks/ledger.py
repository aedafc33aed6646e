"""The run's ledger: one JSON line per event, across restarts."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.memory_use import memory_gb
from hdm_lightning.training.callbacks.steps import StepWatcher, due, last_step
from hdm_lightning.training.json_lines import append_line, read_lines
from hdm_lightning.training.stages import StagePlan

LONGEST_SILENCE_S = 300.0
"""What a `kill -9` between two checkpoints may hide of the time and the money spent."""


class Ledger:
    """Appends events to `ledger.jsonl` and adds up what was spent, restarts included."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path = path
        self.writes = writes

    def append(self, event: str, **values: Any) -> None:
        """Write one line and sync it, so that a crash loses at most the line being written."""
        if not self.writes:
            return
        append_line(self.path, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **values})

    def events(self) -> list[dict[str, Any]]:
        """All whole lines."""
        return read_lines(self.path)

    def seconds_spent(self, stage: str | None = None) -> float:
        """Wall-clock seconds of training so far, of one stage or of all."""
        return self._total("seconds", stage)

    def device_hours_spent(self, stage: str | None = None) -> float:
        """Hours times devices so far, of one stage or of all; starts may have been on different numbers of devices."""
        return self._total("device_hours", stage)

    def cost_spent_usd(self, stage: str | None = None) -> float:
        """Dollars so far, of one stage or of all, each start at the price it had."""
        return self._total("cost_usd", stage)

    def _total(self, key: str, stage: str | None) -> float:
        return sum(event.get(key, 0.0) for event in self.events() if stage is None or event.get("stage") == stage)

    def starts(self, stage: str) -> int:
        """How often the stage was started."""
        return sum(event["event"] == "start" and event.get("stage") == stage for event in self.events())


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
