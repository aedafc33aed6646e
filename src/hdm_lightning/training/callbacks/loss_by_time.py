"""The training loss by the time t between data and noise, exact over all processes and steps since the last entry."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hdm_lightning.training.callbacks.steps import StepWatcher, log_now, logs_now
from hdm_lightning.training.strategies.processes import summed


class TimeBins:
    """Running mean of the loss in equal bins of the time t, kept on the device without waiting for it."""

    def __init__(self, bins: int, device: torch.device) -> None:
        self.sums = torch.zeros(bins, device=device)
        self.counts = torch.zeros(bins, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, t: Tensor, weight: Tensor) -> None:
        """Add a batch's losses (B,) at times (B,) with weights (B,)."""
        bins = (t * len(self.sums)).long().clamp_(0, len(self.sums) - 1)
        self.sums.scatter_add_(0, bins, loss.float() * weight)
        self.counts.scatter_add_(0, bins, weight)

    def packed(self) -> Tensor:
        """(2, bins) sums and counts, ready to be summed over processes."""
        return torch.stack([self.sums, self.counts])

    def reset(self) -> None:
        """Start over."""
        self.sums.zero_()
        self.counts.zero_()


class LossByTime(StepWatcher, Callback):
    """Logs the mean training loss in equal bins of t, and over all, where Lightning logs (`log_every_n_steps`).

    Reads `sample_losses` and `times` of the training step's output and the batch's `weight`. Names are
    `loss_by_time/0.000-0.125` … and `train/loss_mean`; masked samples are left out.

    Args:
        bins: how many.
    """

    def __init__(self, bins: int = 8) -> None:
        super().__init__()
        self.bins = bins
        self._bins: TimeBins | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin empty."""
        super().on_train_start(trainer, pl_module)
        self._bins = TimeBins(self.bins, pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the micro-batch, on the device."""
        assert self._bins is not None
        self._bins.add(outputs["sample_losses"], outputs["times"], batch["weight"])
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log where Lightning does."""
        if not logs_now(trainer):
            return
        assert self._bins is not None
        sums, counts = summed(self._bins.packed()).tolist()
        self._bins.reset()
        metrics = {"train/loss_mean": sum(sums) / sum(counts)} if sum(counts) else {}
        means = ((time_bin_tag(number, self.bins), *each) for number, each in enumerate(zip(sums, counts, strict=True)))
        log_now(trainer, metrics | {tag: total / count for tag, total, count in means if count})


def time_bin_tag(number: int, bins: int) -> str:
    """Name of the training loss in one bin of the time."""
    return f"loss_by_time/{number / bins:.3f}-{(number + 1) / bins:.3f}"
