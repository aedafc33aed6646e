"""The optimizer of a stage and its learning-rate schedule, counted in samples."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hdm_lightning.errors import UserError
from hdm_lightning.training.optimization.muon import MuonAdamW, muon_groups
from hdm_lightning.training.optimization.parameter_groups import RULES, parameter_groups
from hdm_lightning.training.optimization.schedules import rate_factor, warmup_cosine
from hdm_lightning.training.settings import OptimizerSettings, StageSettings

__all__ = ["build_optimizer", "build_rate_schedule", "check_optimizer", "rate_factor"]

KINDS = ("adamw", "muon")


def build_optimizer(
    network: nn.Module, stage: StageSettings, settings: OptimizerSettings, *, fused: bool = True
) -> Optimizer:
    """The stage's optimizer over the network's parameter groups.

    Args:
        network: what is trained.
        stage: rate, decay and betas.
        settings: kind and learning-rate rule.
        fused: one kernel for AdamW's step. A fused step takes scaled gradients as they are, which forbids clipping
            them, so under float16 it must be off.
    """
    groups: list[Any] = [*parameter_groups(network, stage.learning_rate, stage.weight_decay, rule=settings.rule)]
    if settings.name == "muon":
        return MuonAdamW(
            muon_groups(groups),
            betas=stage.betas,
            eps=settings.eps,
            momentum=settings.muon_momentum,
            rounds=settings.muon_rounds,
            fused=fused,
        )
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, eps=settings.eps, fused=fused)


def check_optimizer(settings: OptimizerSettings) -> None:
    """Kind, rule and figures make sense.

    Raises:
        UserError: naming the key under `optimizer`.
    """
    for key, value, known in (("name", settings.name, KINDS), ("rule", settings.rule, tuple(RULES))):
        if value not in known:
            raise UserError(
                f"'{value}' is none of {', '.join(known)}", where=f"optimizer.{key}", hint=f"optimizer.{key}={known[0]}"
            )
    if not 0 <= settings.muon_momentum < 1:
        raise UserError(
            f"{settings.muon_momentum} is not in [0, 1)", where="optimizer.muon_momentum", hint="0.95 is usual"
        )
    if settings.muon_rounds < 1:
        raise UserError(f"{settings.muon_rounds} is below 1", where="optimizer.muon_rounds", hint="5 is usual")


def build_rate_schedule(optimizer: Optimizer, stage: StageSettings) -> LambdaLR:
    """Warm-up and cosine of the stage, one tick per optimizer step."""
    return warmup_cosine(
        optimizer,
        samples=stage.samples,
        samples_per_step=stage.batch_size,
        warmup_samples=stage.warmup_samples,
        final_ratio=stage.final_learning_rate_ratio,
    )
