"""A Lightning callback that records every optimizer step: its end, its loss, and what was compiled by then."""

import json
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch._dynamo.utils import counters


class WatchSteps(Callback):
    """Writes a JSON line at the start of each fit and after each step.

    Args:
        file: path of the output.
    """

    def __init__(self, file: str) -> None:
        self.file, self.step = file, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the start of a fit."""
        self.step = trainer.global_step
        self._note(trainer, pl_module, started=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Record whole steps; the loss only of every fifth, as it waits for the device."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self._note(trainer, pl_module, started=False, loss=float(outputs["loss"]) if self.step % 5 == 0 else None)

    def _note(self, trainer: Trainer, module: LightningModule, *, started: bool, loss: float | None = None) -> None:
        row = {
            "stage": module.hparams.get("stage", ""),
            "started": started,
            "step": trainer.global_step,
            "samples": module.samples_trained,
            "time": time.time(),
            "loss": loss,
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
        }
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
