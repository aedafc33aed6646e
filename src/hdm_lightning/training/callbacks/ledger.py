"""The run's ledger: one JSON line per event, across restarts."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.steps import StepWatcher, due
from hdm_lightning.training.json_lines import append_line, read_lines
from hdm_lightning.training.stages import StagePlan


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
        spent = [event for event in self.events() if stage is None or event.get("stage") == stage]
        return sum(event.get("seconds", 0.0) for event in spent)

    def starts(self, stage: str) -> int:
        """How often the stage was started."""
        return sum(event["event"] == "start" and event.get("stage") == stage for event in self.events())


class KeepLedger(StepWatcher, Callback):
    """Writes the ledger's lines of one stage: start, progress at every checkpoint, end.

    Args:
        ledger: the run's ledger.
        plan: the stage.
        every: optimiser steps between progress lines.
        usd_per_device_hour: price of a device.
    """

    def __init__(self, ledger: Ledger, plan: StagePlan, every: int, usd_per_device_hour: float) -> None:
        super().__init__()
        self.ledger = ledger
        self.plan = plan
        self.every = every
        self.usd_per_device_hour = usd_per_device_hour
        self.before_s = ledger.seconds_spent()
        self.stage_before_s = ledger.seconds_spent(plan.name)
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
        if due(step, self.every, trainer.max_steps):
            self.note("progress", trainer, module)

    def note(self, event: str, trainer: Trainer, module: LightningModule, **values: Any) -> None:
        """Append a line with what was spent since the last one, and further values."""
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        hours = seconds * self.plan.world_size / 3600
        peak = torch.cuda.max_memory_allocated(module.device) / 1e9 if module.device.type == "cuda" else None
        self.ledger.append(
            event,
            stage=self.plan.name,
            samples=trainer.global_step * self.plan.settings.batch_size,
            seconds=round(seconds, 3),
            device_hours=round(hours, 6),
            cost_usd=round(hours * self.usd_per_device_hour, 6),
            peak_memory_gb=peak,
            **values,
        )

    def stage_seconds(self) -> float:
        """Wall-clock seconds of the stage so far, restarts included."""
        return self.stage_before_s + time.monotonic() - self._begin

    def device_hours(self) -> float:
        """Hours of the whole run so far, times the devices."""
        return (self.before_s + time.monotonic() - self._begin) / 3600 * self.plan.world_size

    def cost_usd(self) -> float:
        """Dollars of the whole run so far."""
        return self.device_hours() * self.usd_per_device_hour
