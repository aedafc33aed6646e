"""Blocks of an XUT compiled one by one, for static shapes, and where not to compile.

The names in a state dict stay what they are.
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
"""Graphs that dynamo may make of a function before it gives up: three a shape, of which buckets have tens."""


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
        replace_forward(block, _CompiledForward(block.forward))
    network.has_compiled_blocks = True


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


def replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    """Have one block compute otherwise, under the same names."""
    # The attribute shadows the method on this one instance: no wrapper module, so no other names.
    object.__setattr__(block, "forward", forward)
