"""The ledger of a run: one JSON line per event, across restarts, and the callback that writes it."""

import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.loss_guard import LossRewind
from hdm_lightning.training.callbacks.steps import StepWatcher, samples_trained
from hdm_lightning.training.callbacks.stop_on_signal import StoppedBySignal
from hdm_lightning.training.callbacks.throughput import memory_gb
from hdm_lightning.whole_files import append_line, read_lines

LONGEST_SILENCE_S = 300.0
"""Longest time between two lines, and so the most spending that a `kill -9` between two checkpoints can hide."""


class Ledger:
    """Appends events to a file and adds up time and cost, restarts included.

    Args:
        path: path of the file.
        writes: whether this process writes; all processes read.
    """

    def __init__(self, path: Path | str, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes

    def append(self, event: str, **values: Any) -> None:
        """Write and sync one line, so that a crash loses at most the line being written."""
        if self.writes:
            append_line(self.path, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **values})

    def events(self) -> list[dict[str, Any]]:
        """Return all complete lines."""
        return read_lines(self.path)

    def spent(self, key: str, stage: str | None = None) -> float:
        """Return the wall-clock `seconds`, `device_hours` or `cost_usd` so far, of one stage or of all.

        The number of devices and their price may have changed between starts.
        """
        return sum(_number(event, key) for event in self.events() if stage is None or event.get("stage") == stage)

    def starts(self, stage: str) -> int:
        """Return how often the stage was started."""
        return sum(event.get("event") == "start" and event.get("stage") == stage for event in self.events())


def _number(event: dict[str, Any], key: str) -> float:
    """Return a number of a line; 0 if it is not a finite number, as in a line edited by hand."""
    value = event.get(key, 0.0)
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
    except OverflowError:  # an integer too large for a float
        return 0.0


class KeepLedger(StepWatcher, Callback):
    """Writes the ledger's lines of one fit: start, progress at every checkpoint and every few minutes, end.

    A fit ends with `end`, `stop` (a signal), `rewind` (the loss diverged) or `failed`. A line has the stage, the
    samples, the peak memory, and the seconds, device-hours and dollars spent since the previous line.

    Args:
        path: path of the ledger; later fits append to it.
        stage: name of this fit in the ledger; None for the module's `stage`.
        usd_per_device_hour: price of a device.
    """

    def __init__(self, path: Path | str, *, stage: str | None = None, usd_per_device_hour: float = 0.0) -> None:
        self.ledger = Ledger(path)
        self.stage = stage
        self.usd_per_device_hour = usd_per_device_hour
        self.devices = 1
        self._running = False
        self._mark = self._begin = time.monotonic()
        self._before: dict[tuple[str, bool], float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the time and cost of earlier fits."""
        if self.stage is None:
            self.stage = str(getattr(pl_module, "stage", "train"))
        self.ledger.writes, self.devices = trainer.is_global_zero, trainer.world_size
        self._before = {
            (key, own): self.ledger.spent(key, self.stage if own else None)
            for key in self._costs(0.0)
            for own in (False, True)
        }
        self._mark = self._begin = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the start or restart."""
        super().on_train_start(trainer, pl_module)
        assert self.stage is not None
        self._mark = self._begin = time.monotonic()
        self._running = True
        restarts, samples = self.ledger.starts(self.stage), samples_trained(trainer, pl_module)
        self.ledger.append("start", stage=self.stage, samples=samples, restarts=restarts, devices=self.devices)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Record progress if the last line is too long ago."""
        if time.monotonic() - self._mark >= LONGEST_SILENCE_S:
            self.note("progress", trainer, module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the time and cost up to a checkpoint."""
        if self._running:
            self.note("progress", trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the end, after the last checkpoint is written."""
        self._end("end", trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record another kind of end, and its reason."""
        kinds = {StoppedBySignal: "stop", LossRewind: "rewind"}
        event = next((name for kind, name in kinds.items() if isinstance(exception, kind)), "failed")
        self._end(event, trainer, pl_module, reason=str(exception) or type(exception).__name__)

    def note(self, event: str, trainer: Trainer, module: LightningModule, **values: Any) -> None:
        """Append a line with the time and cost since the last one, and further values.

        The peak memory is that of the first process: of its device, or of the host if it trains on a CPU.
        """
        now = time.monotonic()
        costs, self._mark = self._costs(now - self._mark), now
        memory = memory_gb(trainer.strategy.root_device)  # the module may be back on the CPU
        self.ledger.append(
            event,
            stage=self.stage,
            samples=samples_trained(trainer, module),
            seconds=round(costs["seconds"], 3),
            device_hours=round(costs["device_hours"], 6),
            cost_usd=round(costs["cost_usd"], 6),
            peak_memory_gb=round(memory.get("device_peak", memory["host_peak"]), 3),
            **values,
        )

    def spent(self, key: str, *, stage: bool = False) -> float:
        """Return `seconds`, `device_hours` or `cost_usd` so far, of the whole ledger or of this stage with restarts."""
        return self._before.get((key, stage), 0.0) + self._costs(time.monotonic() - self._begin)[key]

    def _costs(self, seconds: float) -> dict[str, float]:
        hours = seconds * self.devices / 3600
        return {"seconds": seconds, "device_hours": hours, "cost_usd": hours * self.usd_per_device_hour}

    def _end(self, event: str, trainer: Trainer, module: LightningModule, **values: Any) -> None:
        if self._running:
            self._running = False
            self.note(event, trainer, module, **values)
