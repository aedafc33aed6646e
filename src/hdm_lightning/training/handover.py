"""What goes from one stage to the next, or from a stage's checkpoint into its next start."""

from typing import Any

from torch import Tensor, nn

from hdm_lightning.training.averaging.averages import ParameterAverages
from hdm_lightning.training.checkpoint_io import NETWORK_PREFIX, network_weights, read_checkpoint
from hdm_lightning.training.strategies.sharded_tensors import load_weights

__all__ = ["NETWORK_PREFIX", "averaged_weights", "hand_over", "network_weights", "read_checkpoint"]

AVERAGES_KEY = "AverageWeights"


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
