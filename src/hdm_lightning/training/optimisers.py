"""The optimiser of a stage and its learning-rate schedule, counted in samples."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hdm_lightning.training.parameter_groups import parameter_groups
from hdm_lightning.training.settings import OptimizerSettings, StageSettings


def rate_factor(samples: int, total: int, warmup: int, final_ratio: float) -> float:
    """Share of the base rate after `samples`: linear warm-up, then a cosine from 1 to `final_ratio`."""
    if samples < warmup:
        return samples / warmup
    progress = min(1.0, (samples - warmup) / max(1, total - warmup))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimiser(network: nn.Module, stage: StageSettings, settings: OptimizerSettings) -> Optimizer:
    """AdamW over the network's parameter groups, fused where the parameters' device has it."""
    groups: list[Any] = [*parameter_groups(network, stage.learning_rate, stage.weight_decay, rule=settings.rule)]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, eps=settings.eps, fused=True)


def build_rate_schedule(optimiser: Optimizer, stage: StageSettings) -> LambdaLR:
    """Warm-up and cosine of the stage, one tick per optimiser step.

    The step about to be taken counts as seen, so that the first step of a warm-up is not lost at rate 0.
    """

    def factor(step: int) -> float:
        seen = (step + 1) * stage.batch_size
        return rate_factor(seen, stage.samples, stage.warmup_samples, stage.final_learning_rate_ratio)

    return LambdaLR(optimiser, factor)
