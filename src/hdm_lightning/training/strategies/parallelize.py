"""Sharding, activation checkpointing and compilation, applied in this order and in this one place.

None of them changes the names in a state dict, so checkpoints are the same with and without them.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hdm_lightning.models import XUT
from hdm_lightning.models.conditioning import BlockModulation
from hdm_lightning.training.strategies import processes

GRAPHS = 256
"""Graphs that dynamo may make of a function before it gives up: three a shape, of which buckets have tens."""


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
        fully_shard(layer, mesh=mesh, mp_policy=rounded, reshard_after_forward=True, ignored_params=others)


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
            _replace_forward(block, MethodType(recomputed, block))


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


def compile_blocks(network: XUT) -> None:
    """Compile each block by itself, with what recomputes it, for static shapes.

    Blocks of a kind share a graph, so that few are made and in seconds. A sharded block is gathered before its graph
    and given up after it; under DDP a block's gradients are exchanged as soon as its graph has made them. A block that
    cannot be traced whole is an error. Every shape gets a graph of its own: call the network `uncompiled` with shapes
    that come up now and then.
    """
    torch.compiler.reset()  # else the graphs of the stage before would count towards the limit
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.optimize_ddp = False  # it would cut a block's graph where a bucket of gradients is full
    for block in network.blocks():
        _replace_forward(block, _CompiledForward(block.forward))


def is_compiled(network: nn.Module) -> bool:
    """Whether `compile_blocks` or `network.compile()` has been called, so that batches should keep one shape."""
    if getattr(network, "_compiled_call_impl", None) is not None:
        return True
    return any(isinstance(each.__dict__.get("forward"), _CompiledForward) for each in network.modules())


def uncompiled() -> AbstractContextManager[None]:
    """Inside the with statement everything that is compiled runs in eager mode, and no graph is made."""
    if "torch._dynamo" not in sys.modules:  # seconds to import, for nothing
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class _CompiledForward:
    """A block's forward, compiled; a copy of the block compiles its own."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self._forward = forward
        self._compiled = torch.compile(forward, fullgraph=True, dynamic=False)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        modulation: BlockModulation,
        key_mask: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        # The first block of the decoder reads the very tensor that it continues from. The compiler would make a graph
        # for the case that both are one.
        read = tokens.view_as(tokens) if memory is tokens else memory
        return self._compiled(tokens, positions, modulation, key_mask, read)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_CompiledForward":
        return _CompiledForward(copy.deepcopy(self._forward, memo))


def _replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    # The attribute shadows the method on this one instance: no wrapper module, so no other names.
    object.__setattr__(block, "forward", forward)
