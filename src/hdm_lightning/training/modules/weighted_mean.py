"""A mean over all samples of all processes, those of weight 0 left out."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class WeightedMean(Metric):
    """Σ weight·value / Σ weight, summed over processes.

    torchmetrics' `MeanMetric` either drops values that are not numbers, so that a broken training would look well, or
    passes over the weights (`nan_strategy="disable"`, up to 1.9).
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor) -> None:
        """Add values (B,) with weights (B,)."""
        self.total += (value.float() * weight).sum()
        self.count += weight.sum()

    def compute(self) -> Tensor:
        """The mean () so far."""
        return self.total / self.count
