"""Sharding, activation checkpointing and compilation, applied in this order and in this one place.

None of them changes the names in a state dict, so checkpoints are the same with and without them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from hdm_lightning.models import XUT
from hdm_lightning.training import hardware, processes
from hdm_lightning.training.settings import StageSettings, TrainerSettings
from hdm_lightning.training.strategies.sharded_tensors import is_sharded


def shard_network(network: XUT, trainer: TrainerSettings) -> None:
    """Split parameters, gradients and moments over the processes (FSDP2), once for a run and before averages are made.

    What a block, or the shared modulation, multiplies by as a matrix is gathered right before it runs, in the
    precision it is multiplied in, and given up right after: it is gathered a second time for the backward pass. All
    else (gains, rotary frequencies, embeddings) is gathered in float32 once for the whole network: a frequency rounded
    to bfloat16 would not be the one that is saved. Gradients are averaged in float32.
    """
    mesh = init_device_mesh(hardware.accelerator(trainer), (processes.world_size(),))
    mixed = hardware.precision(trainer) == "bf16-mixed"
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(torch.bfloat16 if mixed else None, torch.float32, cast_forward_inputs=False)
    layers = [*network.blocks(), network.modulation]
    matrices = {parameter for layer in layers for parameter in _linear_parameters(layer)}
    # The network comes before its layers, which would otherwise hide their other parameters from it.
    fully_shard(network, mesh=mesh, mp_policy=exact, reshard_after_forward=True, ignored_params=matrices)
    for layer in layers:
        others = set(layer.parameters()) - matrices
        fully_shard(layer, mesh=mesh, mp_policy=rounded, reshard_after_forward=True, ignored_params=others)


def _linear_parameters(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for each in layer.modules() if isinstance(each, nn.Linear) for parameter in each.parameters()]


def prepare_network(network: XUT, stage: StageSettings, trainer: TrainerSettings) -> None:
    """Make the network ready for a stage; calling it again for another stage undoes what the first asked for.

    A sharded network is compiled block by block, between a block's gathering and its giving up.
    """
    checkpoint_blocks(network, stage.activation_checkpointing)
    if trainer.compile:
        torch.compiler.reset()  # else the graphs of the stage before would count towards dynamo's limit for a function
    if trainer.compile and is_sharded(network):
        for block in network.blocks():
            _replace_forward(block, torch.compile(block.forward))
    elif trainer.compile:
        network.compile()


def checkpoint_blocks(network: XUT, active: bool) -> None:
    """Recompute each block's activations in the backward pass, or stop doing so."""
    for block in network.blocks():
        block.__dict__.pop("forward", None)
        if active:
            _replace_forward(block, partial(checkpoint, block.forward, use_reentrant=False))


def _replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    # The attribute shadows the method on this one instance: no wrapper module, so no other names.
    object.__setattr__(block, "forward", forward)
