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
    """Shard parameters, gradients and moments over the processes (FSDP2); call this before averages are created.

    The linear layers of a block, or of the shared modulation, are gathered right before it runs, in the precision of
    the product (float32 for the modulation), and freed right after; they are gathered again for the backward pass.
    Everything else (gains, rotary frequencies, embeddings) is gathered in float32 once for the whole network: a
    frequency rounded to bfloat16 would differ from the saved one. Gradients are averaged in float32.

    Args:
        network: the network to shard.
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
        policy = exact if layer is network.modulation else rounded
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=others)


def _linear_parameters(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for each in layer.modules() if isinstance(each, nn.Linear) for parameter in each.parameters()]


Checkpointing = bool | Literal["selective"]
"""Whether blocks are recomputed in the backward pass; `selective`: except for attention, whose output is kept."""

ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
)
"""Operators that `scaled_dot_product_attention` dispatches to, depending on device, dtype and mask."""


def prepare_network(network: XUT, *, activation_checkpointing: Checkpointing = False, compiled: bool = False) -> None:
    """Prepare the network for a training; a later call for another training replaces the earlier settings."""
    checkpoint_blocks(network, activation_checkpointing)
    if compiled:
        compile_blocks(network)


def checkpoint_blocks(network: XUT, active: Checkpointing) -> None:
    """Recompute each block's activations in the backward pass, or stop doing so.

    `selective` keeps the output of each attention, one sequence of memory: at high resolutions this avoids much of the
    recomputation.
    """
    for block in network.blocks():
        block.__dict__.pop("forward", None)
        if active:
            recomputed = _recomputed_but_for_attention if active == "selective" else _recomputed
            replace_forward(block, MethodType(recomputed, block))


def _recomputed(block: nn.Module, *inputs: Any, **how: Any) -> Tensor:
    # Bound to the block like a method: in torch 2.9, the graph of a partial function could not be shared by blocks.
    def forward(*inputs: Any) -> Tensor:
        computed: Tensor = type(block).forward(block, *inputs)
        return computed

    # Nothing in a block is random, so no generator state needs to be saved and restored.
    recomputed: Tensor = checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **how)
    return recomputed


def _recomputed_but_for_attention(block: nn.Module, *inputs: Any) -> Tensor:
    return _recomputed(block, *inputs, context_fn=_keeping_attention)


def _keeping_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    # A plain function: the compiler accepts no other callable here.
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] = create_selective_checkpoint_contexts(
        list(ATTENTION)
    )
    return contexts
