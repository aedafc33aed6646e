"""Load an optimizer's moments from a checkpoint into another optimizer, by parameter name."""

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
    """Load the moments of an earlier stage, by parameter name if the groups have names.

    The optimizer keeps its own rates, decay and betas, and its groups may differ from those of the checkpoint, which is
    not modified.
    """
    state = regrouped(checkpoint["optimizer_states"][0], optimizer.state_dict())
    # Copied, since the optimizer would otherwise update the checkpoint's tensors in place.
    load_optimizer(optimizer, {**state, "state": tree_map_only(torch.Tensor, _copied, state["state"])})


def _copied(moment: Tensor) -> Tensor:
    """Return a copy; low-bit moments, a tensor subclass that cannot be cloned, are copied by their parts."""
    if not is_traceable_wrapper_subclass(moment):
        return moment.clone()
    names, context = moment.__tensor_flatten__()
    parts = {name: getattr(moment, name).clone() for name in names}
    copied: Tensor = type(moment).__tensor_unflatten__(parts, context, moment.size(), moment.stride())
    return copied


def keep_settings(checkpoint: dict[str, Any], *own: tuple[Optimizer, LRScheduler | None]) -> None:
    """Reduce a checkpoint to resume from to its moments and its positions in the schedules.

    Rates, decay, betas and groups are replaced by those of `own`: each optimizer with its schedule, in the checkpoint's
    order, newly built from the current settings. Otherwise a rate changed before resuming would have no effect. A
    schedule that is not a function of the step (not a `LambdaLR`) keeps the rates of the checkpoint.
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
    """Return an optimizer's state dict with the moments of `saved`, by parameter name, and the groups of `own`."""
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
    """Return (name, number) of every parameter in an optimizer's state dict; the number is the name if it has none."""
    groups = state["param_groups"]
    return [pair for group in groups for pair in zip(group.get("names", group["params"]), group["params"], strict=True)]


class CarryMoments(Callback):
    """Starts a fit with the moments of a checkpoint, unless the fit itself is being resumed.

    Rates, decay and betas stay those of the fit.

    Args:
        checkpoint: checkpoint of the previous training, or its path.
    """

    def __init__(self, checkpoint: dict[str, Any] | Path | str) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the moments."""
        if trainer.global_step == 0:
            read = isinstance(self.checkpoint, dict)
            checkpoint = self.checkpoint if read else read_checkpoint(Path(str(self.checkpoint)), lazily=True)
            carry_moments(checkpoint, trainer.optimizers[0])  # type: ignore[arg-type]
