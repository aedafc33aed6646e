"""Sharding, activation checkpointing and compilation (`models.compiled_blocks`), applied in this order.

None of them changes the names in a state dict, so checkpoints are the same with and without them.
"""

from contextlib import AbstractContextManager
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hdm_lightning.models import XUT
from hdm_lightning.models.compiled_blocks import compile_blocks, replace_forward
from hdm_lightning.training.strategies import processes


def shard_network(network: XUT, device_type: str, *, mixed: bool = False) -> None:
    """Split parameters, gradients and moments over the processes (FSDP2), before averages are made.

    What a block, or the shared modulation, multiplies by as a matrix is gathered right before it runs, in the
    precision it is multiplied in, and given up right after: it is gathered a second time for the backward pass. All
    else (gains, rotary frequencies, embeddings) is gathered in float32 once for the whole network: a frequency rounded
    to bfloat16 would not be the one that is saved. Gradients are averaged in float32.

    Args:
        network: a network of the project's own blocks.
        device_type: `cuda` or `cpu`.
        mixed: whether the training runs in bfloat16 with float32 weights.
    """
    mesh = init_device_mesh(device_type, (processes.world_size(),))
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(torch.bfloat16 if mixed else None, torch.float32, cast_forward_inputs=False)
    layers = [*network.blocks(), network.modulation]
    matrices = {parameter for layer in layers for parameter in _linear_parameters(layer)}
    # The network comes before its layers, which would otherwise hide their other parameters from it.
    fully_shard(network, mesh=mesh, mp_policy=exact, reshard_after_forward=True, ignored_params=matrices)
    for layer in layers:
        others = set(layer.parameters()) - matrices
        policy = exact if layer is network.modulation else rounded  # which multiplies in float32
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=others)


def _linear_parameters(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for each in layer.modules() if isinstance(each, nn.Linear) for parameter in each.parameters()]


Checkpointing = bool | Literal["selective"]
"""Whether blocks are run again in the backward pass; `selective`: all of them but for attention, which is kept."""

ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
)
"""What `scaled_dot_product_attention` comes to, by device, dtype and mask."""


def prepare_network(network: XUT, *, activation_checkpointing: Checkpointing = False, compiled: bool = False) -> None:
    """Make the network ready for a training; calling it again for another one undoes what the first asked for."""
    checkpoint_blocks(network, activation_checkpointing)
    if compiled:
        compile_blocks(network)


def checkpoint_blocks(network: XUT, active: Checkpointing) -> None:
    """Recompute each block's activations in the backward pass, or stop doing so.

    Args:
        network: of the project's own blocks.
        active: `selective` keeps what attention gave, a sequence for each: at high resolutions a good part of what is
            computed again.
    """
    for block in network.blocks():
        block.__dict__.pop("forward", None)
        if active:
            recomputed = _recomputed_but_for_attention if active == "selective" else _recomputed
            replace_forward(block, MethodType(recomputed, block))


def _recomputed(block: nn.Module, *inputs: Any) -> Tensor:
    # Bound to the block as a method is: a graph of a partial function would belong to this one block in torch 2.9.
    def forward(*inputs: Any) -> Tensor:
        computed: Tensor = type(block).forward(block, *inputs)
        return computed

    # Nothing in a block is random, so that no generator's state has to be kept and set.
    recomputed: Tensor = checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
    return recomputed


def _recomputed_but_for_attention(block: nn.Module, *inputs: Any) -> Tensor:
    def forward(*inputs: Any) -> Tensor:
        computed: Tensor = type(block).forward(block, *inputs)
        return computed

    recomputed: Tensor = checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_keeping_attention
    )
    return recomputed


def _keeping_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    # A plain function: the compiler takes no other callable here.
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] = create_selective_checkpoint_contexts(
        list(ATTENTION)
    )
    return contexts
