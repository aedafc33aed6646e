"""Metrics logged per step: the loss by time, norms, and the data seen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hdm_lightning.training.callbacks.steps import StepWatcher, log_now, logs_now, trained_network
from hdm_lightning.training.strategies.processes import summed
from hdm_lightning.training.strategies.sharded_tensors import total_norm


@torch.no_grad()
def add_in_time_bins(totals: Tensor, loss: Tensor, t: Tensor, weight: Tensor) -> None:
    """Add losses (B,) at times (B,) with weights (B,) to the sums of loss and weight in equal bins of t (2, bins)."""
    bins = totals.shape[1]
    place = (t * bins).long().clamp_(0, bins - 1)
    totals.scatter_add_(1, place.expand(2, -1), torch.stack([loss.float() * weight, weight]))


class LossByTime(StepWatcher, Callback):
    """Logs the mean training loss in equal bins of t, and overall, when Lightning logs (`log_every_n_steps`).

    Reads `sample_losses` and `times` of the training step's output and the batch's `weight`. Names are
    `loss_by_time/0.000-0.125` … and `train/loss_mean`; masked samples are left out.

    Args:
        bins: number of bins.
    """

    def __init__(self, bins: int = 8) -> None:
        self.bins = bins
        self._totals = torch.zeros(2, bins)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the bins."""
        super().on_train_start(trainer, pl_module)
        self._totals = torch.zeros(2, self.bins, device=pl_module.device)

    def on_micro_batch(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any) -> None:
        """Add the micro-batch, on the device."""
        add_in_time_bins(self._totals, outputs["sample_losses"], outputs["times"], batch["weight"])

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log when Lightning does."""
        if not logs_now(trainer):
            return
        sums, counts = summed(self._totals).tolist()
        self._totals.zero_()
        metrics = {"train/loss_mean": sum(sums) / sum(counts)} if sum(counts) else {}
        means = ((time_bin_tag(number, self.bins), *each) for number, each in enumerate(zip(sums, counts, strict=True)))
        log_now(trainer, metrics | {tag: total / count for tag, total, count in means if count})


def time_bin_tag(number: int, bins: int) -> str:
    """Return the metric name of the training loss in a bin of the time."""
    return f"loss_by_time/{number / bins:.3f}-{(number + 1) / bins:.3f}"


class Norms(StepWatcher, Callback):
    """Logs `optimizer/gradient_norm` (before clipping) and `optimizer/weight_norm` when Lightning logs."""

    _gradient: Tensor | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure the gradient norm if it will be logged; Lightning clips afterward."""
        if logs_now(trainer):
            gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
            self._gradient = total_norm([gradient for gradient in gradients if gradient is not None])

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log when Lightning does."""
        if logs_now(trainer):
            weights = [weight.detach() for weight in trained_network(module).parameters()]
            metrics = {"optimizer/weight_norm": float(total_norm(weights))}
            if self._gradient is not None:
                metrics["optimizer/gradient_norm"] = float(self._gradient)
                self._gradient = None  # not measured at the last step of a fit that stops early
            log_now(trainer, metrics)


OLD_KEY = "LogScalars"


class DataSeen(StepWatcher, Callback):
    """Logs `seen/samples`, `seen/passes`, `seen/masked` and `seen/quarantined` when Lightning logs.

    Passes are reported if the data module has a `train_plan`. A masked sample could not be used and does not count
    (the batch's `weight` is 0).

    Args:
        quarantine: the data's file of bad samples, one per line, or None.
    """

    state_key = "DataSeen"

    def __init__(self, quarantine: Path | str | None = None) -> None:
        self.quarantine = None if quarantine is None else QuarantineCount(Path(quarantine))
        self.masked = 0.0
        self._since: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        super().on_train_start(trainer, pl_module)
        self._since = torch.zeros((), device=pl_module.device)

    def on_micro_batch(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any) -> None:
        """Count the micro-batch's masked samples, on the device."""
        assert self._since is not None
        if isinstance(batch, Mapping) and "weight" in batch:
            self._since += (1 - batch["weight"]).sum()

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log when Lightning does."""
        if not logs_now(trainer):
            return
        self._add_up()
        samples = int(getattr(module, "samples_trained", 0))
        metrics = {"seen/samples": float(samples), "seen/masked": self.masked}
        plan = getattr(getattr(trainer, "datamodule", None), "train_plan", None)
        if plan is not None:
            metrics["seen/passes"] = samples / plan.samples
        if self.quarantine is not None:
            metrics["seen/quarantined"] = float(self.quarantine.count())
        log_now(trainer, metrics)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the count."""
        self._add_up()
        checkpoint["callbacks"][self.state_key] = {"masked": self.masked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count."""
        self.masked = float(state_dict["masked"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Accept the count under its name in an older version."""
        states = checkpoint["callbacks"]
        if OLD_KEY in states:
            states.setdefault(self.state_key, {"masked": states[OLD_KEY]["holes"]})

    def _add_up(self) -> None:
        if self._since is not None:
            self.masked += float(summed(self._since))
            self._since.zero_()


class QuarantineCount:
    """Counts the distinct bad samples in a growing file, reading each line once.

    Args:
        path: path of the file; every reader may write the same sample.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[bytes] = set()
        self._read = 0

    def count(self) -> int:
        """Return the current number of bad samples."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._read += len(whole)
            self._known |= {line.rpartition(b'"index"')[0] for line in whole.splitlines()}
        return len(self._known)
