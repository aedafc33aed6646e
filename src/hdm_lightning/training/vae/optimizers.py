"""The optimizers of an autoencoder and its discriminator, with their rates counted in samples."""

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hdm_lightning.training.optimization.optimizers import rate_factor
from hdm_lightning.training.settings import StageSettings


def build_adamw(
    network: nn.Module, rate: float, betas: tuple[float, float], weight_decay: float, *, fused: bool = True
) -> Optimizer:
    """Return AdamW over the trainable parameters; only matrices and kernels are decayed, no norm and no bias.

    Under float16 the step must not be fused: it would take scaled gradients, which cannot be clipped.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    rest = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=betas, fused=fused)


def build_schedule(optimizer: Optimizer, stage: StageSettings, *, samples: int) -> LambdaLR:
    """Return warm-up and cosine over `samples`, one tick per step of this optimizer."""

    def factor(step: int) -> float:
        seen = (step + 1) * stage.batch_size
        return rate_factor(seen, samples, stage.warmup_samples, stage.final_learning_rate_ratio)

    return LambdaLR(optimizer, factor)
