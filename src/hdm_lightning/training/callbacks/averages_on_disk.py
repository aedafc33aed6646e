"""Puts the power-function averages on disk while training goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.training.averaging.averages import ParameterAverages
from hdm_lightning.training.averaging.reconstruction import read_snapshots, write_snapshot
from hdm_lightning.training.callbacks.steps import StepWatcher, due, find_callback, last_step
from hdm_lightning.training.callbacks.weight_averages import WeightAverages
from hdm_lightning.training.strategies.processes import rank
from hdm_lightning.training.strategies.sharded_tensors import whole
from hdm_lightning.whole_files import remove_leftovers


class StoreAverages(StepWatcher, Callback):
    """Writes every power-function average of the `WeightAverages` beside it, each so many steps and at the end.

    The averages' own count of samples names the files, from which `averaging.reconstruction` puts any other together.

    Args:
        folder: of the files.
        every_n_steps: optimizer steps between two times; 0 means the end only.
        every_n_samples: the same in samples of all processes, rounded up to steps.
        dtype: of the files.
        transform: what becomes of the tensors by name before they are written, such as the folding of a whitening.
    """

    def __init__(
        self,
        folder: Path | str,
        every_n_steps: int = 0,
        dtype: Literal["float16", "float32"] = "float16",
        transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        *,
        every_n_samples: int = 0,
    ) -> None:
        super().__init__()
        if dtype not in ("float16", "float32"):
            where = "callbacks.ema.snapshot_dtype"
            raise UserError(f"'{dtype}' is neither float16 nor float32", where=where, hint="float16")
        self.folder, self.every_n_steps, self.every_n_samples = Path(folder), every_n_steps, every_n_samples
        self.dtype = torch.float16 if dtype == "float16" else torch.float32
        self.transform = transform
        self._stored_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear away what a killed process left half-written, and what lies beyond the point the fit starts from."""
        super().on_train_start(trainer, pl_module)
        averages = _averages(trainer)
        if trainer.is_global_zero and averages.widths:
            remove_leftovers(self.folder)
            for snapshot in read_snapshots(self.folder):
                if snapshot.samples > averages.samples_seen:
                    snapshot.path.unlink()

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Store where due."""
        every = self.every_n_steps
        if self.every_n_samples and not every:
            every = -(-self.every_n_samples // int(module.samples_per_step))  # type: ignore[arg-type]
        if due(step, every, last_step(trainer)):
            self.store(_averages(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the end, whatever ended the fit."""
        self.store(_averages(trainer))

    def store(self, averages: ParameterAverages) -> None:
        """Write all power-function averages as they are now, once; every process calls this, the first writes."""
        if self._stored_at == averages.samples_seen:
            return
        self._stored_at = averages.samples_seen
        for place, width in enumerate(averages.widths, start=len(averages.halflives)):
            weights = whole(averages.averaged(place))
            if rank() == 0:
                tensors = weights if self.transform is None else self.transform(weights)
                write_snapshot(self.folder, tensors, averages.samples_seen, width, self.dtype)


def _averages(trainer: Trainer) -> ParameterAverages:
    found = find_callback(trainer, WeightAverages)
    if found is None or found.state is None:
        raise UserError("there are no averages to store", where="StoreAverages", hint="add WeightAverages before it")
    return found.state
