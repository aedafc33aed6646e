"""One line that says where the run is: stage, samples, speed, loss, time left, cost so far."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from hdm_lightning.training.callbacks.ledger import KeepLedger
from hdm_lightning.training.callbacks.scalars import LogScalars
from hdm_lightning.training.callbacks.steps import StepWatcher
from hdm_lightning.training.stages import StagePlan

PLAIN_INTERVAL_S = 30.0


class ShowProgress(StepWatcher, Callback):
    """A rich progress bar in a terminal, a plain line now and then elsewhere.

    Args:
        plan: the stage.
        samples_in_schedule: of all stages together, for the time left of the schedule.
        ledger: knows the cost so far.
        scalars: knows the latest loss.
        console: where to write; a new one by default.
    """

    def __init__(
        self,
        plan: StagePlan,
        samples_in_schedule: int,
        ledger: KeepLedger,
        scalars: LogScalars,
        console: Console | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.samples_in_schedule = samples_in_schedule
        self.ledger = ledger
        self.scalars = scalars
        self.console = console or Console()
        self._bar: Progress | None = None
        self._begin = (0.0, 0)
        self._last_line = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        super().on_train_start(trainer, pl_module)
        self._begin = (time.monotonic(), trainer.global_step)
        self._last_line = time.monotonic()
        if self.console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}")]
            self._bar = Progress(*columns, console=self.console, transient=False)
            self._bar.add_task(self.plan.name, total=self.plan.steps, completed=trainer.global_step, state="")
            self._bar.start()

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Bring the line up to date."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, state=self._state(step))
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_S or step == self.plan.steps:
            self._last_line = time.monotonic()
            self.console.print(f"{self.plan.name}: {self._state(step)}", highlight=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal in order."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _state(self, step: int) -> str:
        began, first = self._begin
        rate = (step - first) * self.plan.settings.batch_size / max(time.monotonic() - began, 1e-9)
        samples = step * self.plan.settings.batch_size
        left_in_stage = self.plan.samples - samples
        left_in_all = self.samples_in_schedule - self.plan.samples_before - samples
        loss: Any = self.scalars.latest.get("train/loss")
        parts = [
            f"{samples:,}/{self.plan.samples:,} samples",
            f"{rate:,.1f} images/s",
            *([f"loss {loss:.4f}"] if loss is not None else []),
            f"left {duration(left_in_stage / max(rate, 1e-9))} (all {duration(left_in_all / max(rate, 1e-9))})",
            *([f"${self.ledger.cost_usd():.2f}"] if self.ledger.usd_per_device_hour else []),
        ]
        return " · ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, whole = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"
