"""Puts the power-function averages on disk while training goes on."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.encoders.whitening import TextWhitening
from hdm_lightning.training import processes
from hdm_lightning.training.averaging.averages import WeightAverages
from hdm_lightning.training.averaging.ema_snapshots import read_snapshots, write_snapshot
from hdm_lightning.training.callbacks.steps import StepWatcher, due, last_step
from hdm_lightning.training.sharding import whole
from hdm_lightning.training.text_whitening import folded
from hdm_lightning.whole_files import remove_leftovers


class StoreAverages(StepWatcher, Callback):
    """Writes every power-function average each so many optimizer steps and at the stage's end.

    Args:
        averages: whose power-function averages are stored; their own count of samples names the files.
        folder: of the run's snapshots, one for all stages.
        every: optimizer steps between two times; 0 means the end only.
        dtype: of the files.
        whitening: folded into what is stored, so that it is of the network that the run exports.
    """

    def __init__(
        self,
        averages: WeightAverages,
        folder: Path,
        every: int,
        dtype: torch.dtype,
        whitening: TextWhitening | None = None,
    ) -> None:
        super().__init__()
        self.whitening = whitening
        self.averages = averages
        self.folder = folder
        self.every = every
        self.dtype = dtype

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear away what a killed process left half-written, and what lies beyond the point it goes on from."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and self.averages.widths:
            remove_leftovers(self.folder)
            for snapshot in read_snapshots(self.folder):
                if snapshot.samples > self.averages.samples_seen:
                    snapshot.path.unlink()

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Store where due."""
        if due(step, self.every, last_step(trainer)):
            self.store()

    def store(self) -> None:
        """Write all power-function averages as they are now; every process calls this, the first writes."""
        averages = self.averages
        for place, width in enumerate(averages.widths, start=len(averages.halflives)):
            weights = whole(averages.averaged(place))
            if processes.rank() == 0:
                tensors = folded(weights, self.whitening)
                write_snapshot(self.folder, tensors, averages.samples_seen, width, self.dtype)
