"""Averages of the trained weights: update them, validate them, and store them in the checkpoint and on disk."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.training.averaging.averages import AveragedNetwork, ParameterAverages, check_averages
from hdm_lightning.training.averaging.power_function import read_snapshots, write_snapshot
from hdm_lightning.training.callbacks.steps import (
    StepWatcher,
    due,
    find_callback,
    last_step,
    rename_state,
    samples_trained,
    steps_between,
    trained_network,
)
from hdm_lightning.training.strategies.processes import rank, summed
from hdm_lightning.training.strategies.sharded_tensors import whole
from hdm_lightning.whole_files import remove_leftovers

KEY, OLD_KEY = "WeightAverages", "AverageWeights"


class WeightAverages(StepWatcher, Callback):
    """Exponential and power-function averages of the weights, in float32, updated at every optimizer step.

    A validation logs `val/loss_NAME` for every average if the module has `validation_losses`, as `FlowModule` has.
    Other modules are validated with the first average in place of their weights. Progress is counted in the module's
    `samples_trained`, or in optimizer steps if it has none.

    Args:
        halflife_samples: half-lives in samples, one exponential average per entry.
        ramp: early on, no average reaches further back than this share of the samples seen (EDM2, arXiv 2312.02696).
        sigma_rel: relative widths, one power-function average per entry (section 3 of the same paper).

    Attributes:
        state: the averages, once a fit or a validation has started.
    """

    state_key = KEY

    def __init__(
        self, halflife_samples: Sequence[float] = (500_000,), ramp: float = 0.05, sigma_rel: Sequence[float] = ()
    ) -> None:
        check_averages(halflife_samples, sigma_rel)
        self.halflife_samples, self.ramp, self.sigma_rel = tuple(halflife_samples), ramp, tuple(sigma_rel)
        self.state: ParameterAverages | None = None
        self._saved: dict[str, Any] | None = None
        self._counted = 0
        self._sums: Tensor | None = None
        self._exchanged = ExitStack()

    def bound(self, which: int = 0) -> AveragedNetwork:
        """Return a callable like the network, with average number `which`; the network's weights stay as they are."""
        return self._averages.bound(which)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Create the averages from the network's weights, or from a loaded state."""
        network = trained_network(pl_module)
        if self.state is None or self.state.network is not network:
            self.state = ParameterAverages(network, self.halflife_samples, self.ramp, self.sigma_rel)
            if self._saved is not None:
                self.state.load_state_dict(self._saved)
                self._saved = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """If nothing has been averaged yet, restart from the current weights, which a checkpoint may have changed."""
        self._averages.to(pl_module.device)
        if self._averages.samples_seen == 0:
            self._averages.restart()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting samples."""
        super().on_train_start(trainer, pl_module)
        self._counted = samples_trained(trainer, pl_module)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Update the averages with the new weights."""
        before, self._counted = self._counted, samples_trained(trainer, module)
        self._averages.update(self._counted - before)

    # Validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the sums of losses, or swap in the first average."""
        averages = self._averages
        averages.to(pl_module.device)
        if hasattr(pl_module, "validation_losses"):
            self._sums = torch.zeros(len(averages.shadows), 2, device=pl_module.device)
        elif averages.shadows:
            self._exchanged.enter_context(averages.exchanged(0))

    @torch.no_grad()
    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *place: Any) -> None:
        """Add up the losses of every average."""
        if self._sums is None:
            return
        losses: Callable[..., Tensor] = pl_module.validation_losses
        with trainer.precision_plugin.val_step_context():
            for which, row in enumerate(self._sums):
                loss = losses(batch, self._averages.bound(which))
                row += torch.stack([(loss * batch["weight"]).sum(), batch["weight"].sum()])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means over all processes, without masked samples."""
        if self._sums is not None:
            totals, self._sums = summed(self._sums), None
            for name, (total, count) in zip(self._averages.names(), totals, strict=True):
                pl_module.log(f"val/loss_{name}", total / count, sync_dist=True)  # equal everywhere

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the weights before anything is saved."""
        self._exchanged.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the weights."""
        self._exchanged.close()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the averages as plain containers and whole tensors."""
        return {} if self.state is None else self.state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load averages from a checkpoint or from the previous training."""
        if self.state is None:
            self._saved = state_dict
        else:
            self.state.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Accept the averages under their name in an older version."""
        rename_state(checkpoint, OLD_KEY, KEY)

    @property
    def _averages(self) -> ParameterAverages:
        assert self.state is not None, "the averages are created by setup"
        return self.state


def averages_state(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return the averages in a training checkpoint, including one of an older version, or None."""
    states = checkpoint.get("callbacks", {})
    return states.get(KEY) or states.get(OLD_KEY)


class StoreAverages(StepWatcher, Callback):
    """Writes the power-function averages of the trainer's `WeightAverages` at regular steps and at the end.

    The averages' own count of samples names the files; `averaging.power_function` reconstructs any other from them.

    Args:
        folder: folder of the files.
        every_n_steps: optimizer steps between two writes; 0 means only at the end.
        every_n_samples: the same in samples of all processes, rounded up to steps.
        dtype: dtype of the files.
        transform: applied to the tensors (by name) before they are written, such as folding in a whitening.
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
        if dtype not in ("float16", "float32"):
            where = "callbacks.store_averages.dtype"
            raise UserError(f"'{dtype}' is neither float16 nor float32", where=where, hint="use float16")
        self.folder, self.every_n_steps, self.every_n_samples = Path(folder), every_n_steps, every_n_samples
        self.dtype = torch.float16 if dtype == "float16" else torch.float32
        self.transform = transform
        self._stored_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delete partial files left by a killed process, and averages from beyond the point the fit starts from."""
        super().on_train_start(trainer, pl_module)
        averages = _averages(trainer)
        if trainer.is_global_zero and averages.widths:
            remove_leftovers(self.folder)
            for snapshot in read_snapshots(self.folder):
                if snapshot.samples > averages.samples_seen:
                    snapshot.path.unlink()

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Store if due."""
        every = steps_between(module, self.every_n_steps, self.every_n_samples)
        if due(step, every, last_step(trainer)):
            self.store(_averages(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store at the end, whatever ended the fit."""
        self.store(_averages(trainer))

    def store(self, averages: ParameterAverages) -> None:
        """Write the current power-function averages, once; all processes must call this, the first one writes."""
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
