"""Compile the blocks of an XUT one by one, for static shapes, and switch compilation off where it does not pay.

The names in a state dict do not change.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hdm_lightning.models.conditioning import BlockModulation
from hdm_lightning.models.xut import XUT

GRAPHS = 256
"""Graphs that dynamo may compile per function before it gives up: three per shape, for tens of bucket shapes."""


def compile_blocks(network: XUT) -> None:
    """Compile each block by itself, with its activation checkpointing, for static shapes.

    Blocks of the same kind share a graph, so few are compiled, within seconds. A sharded block is gathered before its
    graph runs and freed after it; under DDP a block's gradients are reduced as soon as its graph has computed them. A
    block that cannot be traced as one graph raises an error. Every shape gets its own graph: run shapes that occur
    rarely under `uncompiled`.
    """
    torch.compiler.reset()  # otherwise the graphs of the previous stage would count toward the limit
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.optimize_ddp = False  # it would split a block's graph where a gradient bucket is full
    for block in network.blocks():
        replace_forward(block, _CompiledForward(block.forward))
    network.has_compiled_blocks = True


def uncompiled() -> AbstractContextManager[None]:
    """Return a context in which compiled code runs in eager mode and no graph is compiled."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and the import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class _CompiledForward:
    """The compiled forward of a block; a copy of the block compiles its own."""

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
        # In the decoder's first block, tokens and memory may be the same tensor. The compiler would make an extra graph
        # for that case.
        read = tokens.view_as(tokens) if memory is tokens else memory
        return self._compiled(tokens, positions, modulation, key_mask, read)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_CompiledForward":
        return _CompiledForward(copy.deepcopy(self._forward, memo))


def replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the forward of one block; the names of its parameters do not change."""
    # The attribute shadows the method on this instance only: there is no wrapper module to add a prefix.
    object.__setattr__(block, "forward", forward)
