"""One line that says where the run is: stage, samples, speed, loss, time left, cost so far."""

import time
from typing import Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from hdm_lightning.training.callbacks.ledger import KeepLedger
from hdm_lightning.training.callbacks.steps import StepWatcher
from hdm_lightning.training.stages import StagePlan

PLAIN_INTERVAL_S = 30.0


class Latest(Protocol):
    """Whoever knows the latest scalars."""

    latest: dict[str, float]


class ShowProgress(StepWatcher, Callback):
    """A rich progress bar in a terminal, a plain line now and then elsewhere.

    Args:
        plan: the stage.
        samples_after: what the stages after this one come to, in samples of this stage: each of their samples
            counts as often as it costs.
        ledger: knows the cost so far.
        scalars: knows the latest loss, under `loss`.
        console: where to write; a new one by default.
    """

    def __init__(
        self,
        plan: StagePlan,
        samples_after: float,
        ledger: KeepLedger,
        scalars: Latest,
        console: Console | None = None,
        loss: str = "loss/train",
    ) -> None:
        super().__init__()
        self.plan = plan
        self.samples_after = samples_after
        self.ledger = ledger
        self.scalars = scalars
        self.console = console or Console()
        self.loss = loss
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
            self.console.print(f"{self.plan.name}: {self._state(step)}", highlight=False, soft_wrap=True)

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
        left = self.plan.samples - samples
        loss = self.scalars.latest.get(self.loss)
        parts = [
            f"{samples:,}/{self.plan.samples:,} samples",
            f"{rate:,.1f} images/s",
            *([f"loss {loss:.4f}"] if loss is not None else []),
            *([f"left {self._left(left, rate)} (all {self._left(left + self.samples_after, rate)})"] if rate else []),
            self._spent(),
        ]
        return " · ".join(parts)

    def _left(self, samples: float, rate: float) -> str:
        return duration(samples / rate)

    def _spent(self) -> str:
        """Dollars where a device has a price, else hours of devices."""
        if self.ledger.usd_per_device_hour:
            return f"${self.ledger.cost_usd():.2f}"
        return f"{self.ledger.device_hours():.2f} device-hours"


def duration(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, whole = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"
