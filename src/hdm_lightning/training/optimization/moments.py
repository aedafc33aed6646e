"""An optimizer's moments from a checkpoint into another optimizer, by the parameters' names."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from hdm_lightning.training.checkpoint_io import read_checkpoint
from hdm_lightning.training.strategies.sharded_tensors import load_optimizer


def carry_moments(checkpoint: dict[str, Any], optimizer: Optimizer) -> None:
    """Take over the moments of a stage before, by the parameters' names where the groups have them.

    The optimizer's own rates, decay and betas stay, and its groups may be cut otherwise than those of the checkpoint,
    which stays as it is.
    """
    state = regrouped(checkpoint["optimizer_states"][0], optimizer.state_dict())
    # Moments of the right dtype and device would be taken as they are, and trained on.
    load_optimizer(optimizer, {**state, "state": tree_map_only(torch.Tensor, _copied, state["state"])})


def _copied(moment: Tensor) -> Tensor:
    """A copy; of moments of few bits, which are a class of their own that cannot be cloned, one made of its parts."""
    if not is_traceable_wrapper_subclass(moment):
        return moment.clone()
    names, context = moment.__tensor_flatten__()
    parts = {name: getattr(moment, name).clone() for name in names}
    copied: Tensor = type(moment).__tensor_unflatten__(parts, context, moment.size(), moment.stride())
    return copied


def keep_settings(checkpoint: dict[str, Any], *own: tuple[Optimizer, LRScheduler | None]) -> None:
    """Let a checkpoint to resume from keep its moments and its places in the schedules only.

    Rates, decay, betas and the groups they are given to become those of `own`, each optimizer with its schedule in the
    checkpoint's order, just built from the settings of now: else a rate that was changed before resuming would count
    for nothing. A schedule that is no function of the step (no `LambdaLR`) keeps the rates of the checkpoint.
    """
    states, places = checkpoint["optimizer_states"], iter(checkpoint["lr_schedulers"])
    for number, (optimizer, schedule) in enumerate(own):
        settings = optimizer.state_dict()
        if isinstance(schedule, LambdaLR):
            _rates_of_now(settings["param_groups"], schedule, next(places))
        elif schedule is not None:
            next(places, None)
            _rates_as_saved(settings["param_groups"], states[number]["param_groups"])
        states[number] = regrouped(states[number], settings)


def regrouped(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with the moments of one by the parameters' names, and the groups of another."""
    moments = {name: saved["state"].get(number) for name, number in _numbered(saved)}
    state = {number: moments[name] for name, number in _numbered(own) if moments.get(name)}
    return {"state": state, "param_groups": own["param_groups"]}


def _rates_of_now(groups: list[dict[str, Any]], schedule: LambdaLR, place: dict[str, Any]) -> None:
    for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(place["last_epoch"])
    rates = {"base_lrs": list(schedule.base_lrs), "_last_lr": [group["lr"] for group in groups]}
    place |= {**rates, "lr_lambdas": [None] * len(schedule.lr_lambdas)}


def _rates_as_saved(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    if len(groups) == len(saved):
        for group, before in zip(groups, saved, strict=True):
            group |= {key: before[key] for key in ("lr", "initial_lr") if key in before}


def _numbered(state: dict[str, Any]) -> list[tuple[Any, int]]:
    """Name (or number where there are no names) and number of every parameter in an optimizer's state dict."""
    groups = state["param_groups"]
    return [pair for group in groups for pair in zip(group.get("names", group["params"]), group["params"], strict=True)]


class CarryMoments(Callback):
    """Begins a fit with the moments of a checkpoint, unless the fit itself is being resumed.

    Rates, decay and betas stay those of the fit.

    Args:
        checkpoint: of the training before, read or not.
    """

    def __init__(self, checkpoint: dict[str, Any] | Path | str) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the moments over."""
        if trainer.global_step == 0:
            read = isinstance(self.checkpoint, dict)
            checkpoint = self.checkpoint if read else read_checkpoint(Path(str(self.checkpoint)), lazily=True)
            carry_moments(checkpoint, trainer.optimizers[0])  # type: ignore[arg-type]
