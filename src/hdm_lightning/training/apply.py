"""Activation checkpointing and compilation, applied in this order and in this one place.

Neither changes the names in a state dict, so checkpoints are the same with and without them.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from hdm_lightning.models import XUT
from hdm_lightning.training.settings import StageSettings, TrainerSettings


def prepare_network(network: XUT, stage: StageSettings, trainer: TrainerSettings) -> None:
    """Make the network ready for a stage; calling it again for another stage undoes what the first asked for."""
    checkpoint_blocks(network, stage.activation_checkpointing)
    if trainer.compile:
        network.compile()


def checkpoint_blocks(network: XUT, active: bool) -> None:
    """Recompute each block's activations in the backward pass, or stop doing so."""
    for block in network.blocks():
        block.__dict__.pop("forward", None)
        if active:
            _recompute(block)


def _recompute(block: nn.Module) -> None:
    # The attribute shadows the method on this one instance: no wrapper module, so no other names.
    object.__setattr__(block, "forward", partial(checkpoint, block.forward, use_reentrant=False))
