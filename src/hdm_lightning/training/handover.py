"""What goes from one stage to the next, or from a stage's checkpoint into its next start."""

import copy
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hdm_lightning.errors import UserError
from hdm_lightning.training.averaging.averages import WeightAverages
from hdm_lightning.training.sharding import load_optimizer, load_weights

NETWORK_PREFIX = "network."
AVERAGES_KEY = "AverageWeights"


class DamagedCheckpoint(UserError):
    """A file that stands for a training checkpoint and cannot be read as one.

    Attributes:
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        hint = "take another checkpoint of the run; `hdm-train` itself goes on from the newest one that is whole"
        super().__init__(f"is damaged: {reason}", where=str(path), hint=hint)
        self.reason = reason


def read_checkpoint(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """A training checkpoint, loaded without running any code it might hold.

    Args:
        path: the file.
        lazily: leave the tensors on disk until they are used; their memory is shared by the processes of a machine and
            given up where it is short.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise DamagedCheckpoint(path, "it is cut off, or no checkpoint at all")
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except pickle.UnpicklingError as error:  # whose message advises to load it all the same
        raise DamagedCheckpoint(path, "it holds more than plain data, or is cut off") from error
    except DamagedCheckpoint:  # a ValueError, as all of the user's errors are
        raise
    except OSError as error:
        raise DamagedCheckpoint(path, error.strerror or "it cannot be read") from error
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError) as error:
        message = str(error).strip() or type(error).__name__
        raise DamagedCheckpoint(path, message.splitlines()[0][:160]) from error
    return loaded


def network_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The network's own state dict out of a training checkpoint."""
    state = checkpoint["state_dict"]
    return {
        name.removeprefix(NETWORK_PREFIX): value for name, value in state.items() if name.startswith(NETWORK_PREFIX)
    }


def averaged_weights(checkpoint: dict[str, Any], which: int) -> dict[str, Tensor]:
    """The network's state dict with saved average number `which` in place of the trained parameters."""
    return network_weights(checkpoint) | checkpoint["callbacks"][AVERAGES_KEY]["shadows"][which]


def hand_over(checkpoint: dict[str, Any], network: nn.Module, averages: WeightAverages) -> None:
    """Give the next stage the weights and averages that a finished stage left on disk.

    A stage always starts from the file, also when the last stage ran in the same process, so that an
    interrupted schedule and an uninterrupted one take the same way.
    """
    load_weights(network, network_weights(checkpoint))
    averages.load_state_dict(checkpoint["callbacks"][AVERAGES_KEY])


def carry_moments(checkpoint: dict[str, Any], optimizer: Optimizer) -> None:
    """Take over the optimizer's moments, by the parameters' names where the groups tell them.

    The new stage's rates, decay and betas stay, and its groups may be cut otherwise than those of the stage before. The
    checkpoint stays as it is, for a stage that goes back to its beginning.
    """
    state = regrouped(checkpoint["optimizer_states"][0], optimizer.state_dict())
    # Moments of the right dtype and device would be taken as they are, and trained on.
    load_optimizer(optimizer, {**state, "state": copy.deepcopy(state["state"])})


def keep_settings(checkpoint: dict[str, Any], *own: tuple[Optimizer, LambdaLR]) -> None:
    """Let a checkpoint to resume from keep its moments and its places in the schedules only.

    Rates, decay, betas and the groups they are given to become those of `own`, each optimizer with its schedule in the
    checkpoint's order, just built from the settings of now: else a rate that was changed before resuming would count
    for nothing.
    """
    states, places = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    for number, (optimizer, schedule) in enumerate(own):
        settings = optimizer.state_dict()
        for group, factor in zip(settings["param_groups"], schedule.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(places[number]["last_epoch"])
        states[number] = regrouped(states[number], settings)
        rates = {"base_lrs": list(schedule.base_lrs), "_last_lr": [group["lr"] for group in settings["param_groups"]]}
        places[number] |= {**rates, "lr_lambdas": [None] * len(schedule.lr_lambdas)}


def regrouped(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with the moments of one by the parameters' names, and the groups of another."""
    moments = {name: saved["state"].get(number) for name, number in _numbered(saved)}
    state = {number: moments[name] for name, number in _numbered(own) if moments.get(name)}
    return {"state": state, "param_groups": own["param_groups"]}


def _numbered(state: dict[str, Any]) -> list[tuple[Any, int]]:
    """Name (or number where there are no names) and number of every parameter in an optimizer's state dict."""
    groups = state["param_groups"]
    return [pair for group in groups for pair in zip(group.get("names", group["params"]), group["params"], strict=True)]
