"""Clipping of gradients by their common norm, whatever the precision."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.optim import Optimizer


class ClippingModule(LightningModule):
    """A LightningModule whose gradients are clipped also before a fused step in bfloat16.

    Lightning's own clipping refuses fused optimizers under every mixed precision, since one that takes scaled
    gradients cannot be clipped; only float16 has a scaler.
    """

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Scale the gradients down to a norm of at most `gradient_clip_val`; None or 0 leaves them as they are."""
        if gradient_clip_val:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
