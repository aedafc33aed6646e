"""The progress of a training in samples: a rich bar in a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.text import Text

from hdm_lightning.training.callbacks.keep_ledger import KeepLedger
from hdm_lightning.training.callbacks.steps import find_callback, samples_trained
from hdm_lightning.training.run_log import note, say

REFRESH_S = 0.5
"""Seconds between two reads of the loss, each of which waits for the device."""
WORTH_TELLING_H = 1.0
"""Fewest device-hours to show when they have no price."""
KEPT_EVERY_S = 300.0
"""Seconds between two lines that a bar writes to the run's log."""
FIRST_TO_GO = ("spent", "speed", "loss", "left")
"""Parts that are dropped in a narrow terminal, in this order."""
SHORTEST_BAR = 10


def fitting(parts: dict[str, str], width: int) -> str:
    """Return as many parts of a line as fit, in order; the samples are never dropped."""
    kept = dict(parts)
    for name in FIRST_TO_GO:
        if len(" · ".join(kept.values())) <= width:
            break
        kept.pop(name, None)
    return " · ".join(kept.values())


class Progress(RichProgressBar):
    """Lightning's rich progress bar, with samples, images per second, loss, time left and cost.

    If the output is not a terminal, it prints plain lines instead. The cost comes from a `KeepLedger` among the
    callbacks.

    Args:
        stage: name of the training; None for the module's `stage`.
        samples_after: work after this training, in samples of this one, for the total time left.
        plain_every_s: seconds between two plain lines.
        loss: name of the logged loss to show.
        kwargs: further arguments of `RichProgressBar`.
    """

    wants_metrics = False
    """It reads the loss itself, now and then; metrics that modules show in a bar are copied to the host every step."""

    def __init__(
        self,
        stage: str | None = None,
        *,
        samples_after: float = 0.0,
        plain_every_s: float = 30.0,
        loss: str = "train/loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.stage, self.samples_after, self.plain_every_s, self.loss = stage, samples_after, plain_every_s, loss
        self._begin = (0.0, 0)
        self._looked = self._printed = 0.0
        self._shown: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show the bar only in a terminal."""
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self.disable()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the validation, which takes time before the first step."""
        super().on_sanity_check_start(trainer, pl_module)
        if self.is_disabled and trainer.is_global_zero:
            say(f"{self._name(pl_module)}: validating before the first step")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._begin = (time.monotonic(), samples_trained(trainer, pl_module))
        self._printed = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update the bar, and print a line if due."""
        super().on_train_batch_end(trainer, pl_module, *args)
        every = self.plain_every_s if self.is_disabled else KEPT_EVERY_S
        late = time.monotonic() - self._printed >= every
        if trainer.is_global_zero and (late or trainer.global_step == trainer.max_steps):
            self._printed = time.monotonic()
            line = f"{self._name(pl_module)}: {' · '.join(self.state(trainer, pl_module).values())}"
            (say if self.is_disabled else note)(line)

    @property
    def total_train_batches(self) -> int | float:
        """Number of micro-batches in the whole fit."""
        batches, steps = super().total_train_batches, self.trainer.max_steps
        per_step = getattr(self.trainer.lightning_module, "accumulation", self.trainer.accumulate_grad_batches)
        return steps * per_step if batches == float("inf") and steps > 0 else batches

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return nothing for Lightning's own column; `configure_columns` has one that fits the terminal."""
        now = time.monotonic()
        if now - self._looked >= REFRESH_S:
            self._looked, self._shown = now, self.state(trainer, pl_module)
        return {}

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Return the name, the bar, and as much of the state as fits the terminal."""
        return [TextColumn("{task.description}"), BarColumn(bar_width=None), _State(self)]

    @property
    def sanity_check_description(self) -> str:
        """Name of the bar during the validation before the first step."""
        return "validation before the first step"

    @property
    def validation_description(self) -> str:
        """Name of the bar during a validation."""
        return "validation"

    def text_of(self, task: Task, width: int) -> str:
        """Return the text next to a task's bar: the training's state, or the batches done of a validation."""
        if task.id == self.train_progress_bar_id:
            return fitting(self._shown, width)
        return f"{task.completed:.0f}/{task.total:.0f} batches" if task.total else ""

    def state(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        """Return samples, speed, loss, time left, and cost, as far as they are known."""
        began, first = self._begin
        samples = samples_trained(trainer, module)
        rate = (samples - first) / max(time.monotonic() - began, 1e-9)
        total = trainer.max_steps * int(getattr(module, "samples_per_step", 1)) if trainer.max_steps > 0 else None
        parts = {"samples": f"{samples:,}" + (f"/{total:,} samples" if total else " samples")}
        parts["speed"] = f"{rate:,.1f} images/s"
        loss = trainer.callback_metrics.get(self.loss)
        if loss is not None:
            parts["loss"] = f"loss {float(loss):.4f}"
        if rate and total:
            left = duration((total - samples) / rate)
            everything = duration((total - samples + self.samples_after) / rate)
            parts["left"] = f"{left} left" + (f", {everything} for all stages" if self.samples_after else "")
        spent = self._spent(trainer)
        return parts | ({"spent": spent} if spent else {})

    def _get_train_description(self, current_epoch: int) -> str:
        return self._name(self.trainer.lightning_module)

    def _name(self, module: LightningModule) -> str:
        return self.stage or str(getattr(module, "stage", "train"))

    def _spent(self, trainer: Trainer) -> str | None:
        """Return the cost in dollars if devices have a price, otherwise in device-hours."""
        ledger = find_callback(trainer, KeepLedger)
        if ledger is None:
            return None
        if ledger.usd_per_device_hour:
            return f"${ledger.spent('cost_usd'):.2f}"
        hours = ledger.spent("device_hours")
        return f"{hours:.1f} device-hours spent" if hours >= WORTH_TELLING_H else None


def duration(seconds: float) -> str:
    """Format seconds as `45 s`, `12 min`, `3 h 20 min` or `137 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 10 else f"{round(minutes / 60)} h"


class _State(ProgressColumn):
    """The column after the bar."""

    def __init__(self, bar: Progress) -> None:
        super().__init__()
        self.bar = bar

    def render(self, task: Task) -> Text:
        """Return as much text as fits."""
        width = self.bar._console.width if self.bar._console is not None else 80
        return Text(self.bar.text_of(task, width - len(task.description) - SHORTEST_BAR - 2), no_wrap=True)
