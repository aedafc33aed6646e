"""What goes from one stage to the next, or from a stage's checkpoint into its next start."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdm_lightning.training.averaging.averages import ParameterAverages
from hdm_lightning.training.strategies.sharded_tensors import load_weights

NETWORK_PREFIX = "network."
AVERAGES_KEY = "AverageWeights"


def read_checkpoint(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """A training checkpoint, loaded without running any code it might hold.

    Args:
        path: the file.
        lazily: leave the tensors on disk until they are used; their memory is shared by the processes of a machine and
            given up where it is short.
    """
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
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


def hand_over(checkpoint: dict[str, Any], network: nn.Module, averages: ParameterAverages) -> None:
    """Give the next stage the weights and averages that a finished stage left on disk.

    A stage always starts from the file, also when the last stage ran in the same process, so that an
    interrupted schedule and an uninterrupted one take the same way.
    """
    load_weights(network, network_weights(checkpoint))
    averages.load_state_dict(checkpoint["callbacks"][AVERAGES_KEY])
