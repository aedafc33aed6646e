"""What goes from one stage to the next, or from a trained model into a first stage."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hdm_lightning.training.averages import WeightAverages
from hdm_lightning.training.sharding import load_optimiser, load_weights

NETWORK_PREFIX = "network."
AVERAGES_KEY = "AverageWeights"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint, loaded without running any code it might hold."""
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
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


def carry_moments(checkpoint: dict[str, Any], optimiser: Optimizer) -> None:
    """Take over the optimiser's moments, by the parameters' names where the groups tell them.

    The new stage's rates, decay and betas stay, and its groups may be cut otherwise than those of the stage before.
    """
    saved, own = checkpoint["optimizer_states"][0], optimiser.state_dict()
    moments = {name: saved["state"].get(number) for name, number in _numbered(saved)}
    state = {number: moments[name] for name, number in _numbered(own) if moments.get(name)}
    load_optimiser(optimiser, {"state": state, "param_groups": own["param_groups"]})


def _numbered(state: dict[str, Any]) -> list[tuple[Any, int]]:
    """Name (or number where there are no names) and number of every parameter in an optimiser's state dict."""
    groups = state["param_groups"]
    return [pair for group in groups for pair in zip(group.get("names", group["params"]), group["params"], strict=True)]
