"""Training scalars on one axis: samples seen since the start of the schedule."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.callbacks.steps import StepWatcher, due
from hdm_lightning.training.flow_module import FlowMatchingModule
from hdm_lightning.training.processes import summed


def samples_seen(trainer: Trainer) -> int:
    """Samples seen since the start of the schedule."""
    module = trainer.lightning_module
    assert isinstance(module, FlowMatchingModule)
    return module.plan.samples_before + trainer.global_step * module.plan.settings.batch_size


def log(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Write metrics to every logger at the present number of samples."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=samples_seen(trainer))


class LogScalars(StepWatcher, Callback):
    """Losses, rates, norms, speed and the split of a step's time, every so many optimiser steps.

    Args:
        every: optimiser steps between two entries.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.latest: dict[str, float] = {}
        self._gradient_norm: torch.Tensor | None = None
        self._since = 0.0
        self._since_step = 0
        self._waiting_since: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        super().on_train_start(trainer, pl_module)
        self._since, self._since_step = time.perf_counter(), trainer.global_step
        self._waiting_since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What passed since the last batch was spent waiting for data."""
        if self._waiting_since is not None and isinstance(pl_module, FlowMatchingModule):
            pl_module.clock.add("data", time.perf_counter() - self._waiting_since)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Gradient norm before clipping, only where it will be written."""
        if due(trainer.global_step + 1, self.every, trainer.max_steps):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._gradient_norm = torch.nn.utils.get_total_norm(gradients)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act on whole steps, then wait for data again."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._waiting_since = time.perf_counter()

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Write where due."""
        assert isinstance(module, FlowMatchingModule)
        if due(step, self.every, trainer.max_steps):
            module.clock.stop("optimiser")
            self.latest = self._collect(trainer, module, step)
            log(trainer, self.latest)

    def _collect(self, trainer: Trainer, module: FlowMatchingModule, step: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds, steps = now - self._since, step - self._since_step
        self._since, self._since_step = now, step
        metrics = self._losses(module)
        metrics["optimiser/learning_rate_factor"] = self._rate_factor(trainer)
        if self._gradient_norm is not None:
            metrics["optimiser/gradient_norm"] = float(self._gradient_norm)
        weights = [p.detach() for p in module.network.parameters()]
        metrics["optimiser/weight_norm"] = float(torch.nn.utils.get_total_norm(weights))
        metrics["speed/images_per_s"] = steps * module.plan.settings.batch_size / seconds
        for name, spent in module.clock.drain().items():
            metrics[f"step_time_ms/{name}"] = 1000 * spent / steps
        metrics["step_time_ms/whole"] = 1000 * seconds / steps
        if module.device.type == "cuda":
            metrics["memory/peak_gb"] = torch.cuda.max_memory_allocated(module.device) / 1e9
        return metrics

    def _losses(self, module: FlowMatchingModule) -> dict[str, float]:
        assert module.time_bins is not None
        sums, counts = summed(module.time_bins.packed()).tolist()
        module.time_bins.reset()
        bins = len(sums)
        losses = {"train/loss": sum(sums) / max(sum(counts), 1e-9)}
        for number, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                losses[f"train_loss_by_time/{number / bins:.3f}-{(number + 1) / bins:.3f}"] = total / count
        return losses

    def _rate_factor(self, trainer: Trainer) -> float:
        group = trainer.optimizers[0].param_groups[0]
        return float(group["lr"] / group["initial_lr"])
