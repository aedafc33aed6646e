"""Norms of gradients and weights, which tell a training that is about to go wrong."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hdm_lightning.training.callbacks.steps import StepWatcher, log_now, logs_now, trained_network
from hdm_lightning.training.strategies.sharded_tensors import total_norm


class Norms(StepWatcher, Callback):
    """Logs `optimizer/gradient_norm` (before clipping) and `optimizer/weight_norm` where Lightning logs."""

    def __init__(self) -> None:
        super().__init__()
        self._gradient: Tensor | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure the gradients, only where the norm will be logged; Lightning clips afterwards."""
        if logs_now(trainer):
            gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
            self._gradient = total_norm([gradient for gradient in gradients if gradient is not None])

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log where Lightning does."""
        if logs_now(trainer):
            weights = [weight.detach() for weight in trained_network(module).parameters()]
            metrics = {"optimizer/weight_norm": float(total_norm(weights))}
            if self._gradient is not None:
                metrics["optimizer/gradient_norm"] = float(self._gradient)
                self._gradient = None  # a fit that ends early has none of its last step
            log_now(trainer, metrics)
