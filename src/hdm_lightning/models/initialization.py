"""Initial values of every kind of tensor of an XUT, one explicit line a kind.

Matrices are normal with standard deviation 1/√fan_in, so that the scale of activations does not depend on the
width. The last matrix of each residual branch is divided by √(number of sublayers) as well, so that the sum over
branches stays of the order of one. Zero: all biases, the adaLN outputs (modulation starts at the identity), the
aspect-ratio output (the input starts without effect) and the output projection (the first velocity is 0, and
under muP an output layer may start at zero at any width).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from hdm_lightning.models.attention import CrossAttention, SelfAttention
from hdm_lightning.models.blocks import ModulatedNorm, SwiGLU, XUTBlock
from hdm_lightning.models.conditioning import AdaptiveNorm, AspectRatioEmbedding
from hdm_lightning.models.config import RopeInit

_HIGHEST_FREQUENCY = {"spread_5pi": 5 * math.pi, "spread_10pi": 10 * math.pi, "all_pi": math.pi}


@torch.no_grad()
def initialize(network: nn.Module, rope_init: RopeInit, zero_outputs: list[nn.Linear]) -> None:
    """Fill every parameter of ``network`` in place, drawing from torch's default generator.

    Args:
        network: the whole XUT.
        rope_init: where the rotary frequencies start.
        zero_outputs: linear layers to zero besides those of the conditioning.
    """
    sublayers = sum(3 if block.reads_memory else 2 for block in _blocks(network))
    for module in network.modules():
        if isinstance(module, nn.Linear):
            _normal(module, 1.0)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, ModulatedNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, SelfAttention | CrossAttention):
            module.log_frequencies.copy_(log_frequencies(module.heads, module.head_dim, rope_init))
    for module in network.modules():
        if isinstance(module, SelfAttention | CrossAttention | SwiGLU):
            _normal(module.output, 1 / math.sqrt(sublayers))
        elif isinstance(module, AdaptiveNorm | AspectRatioEmbedding):
            zero_outputs = [*zero_outputs, module.output]
    for linear in zero_outputs:
        nn.init.zeros_(linear.weight)


def log_frequencies(heads: int, head_dim: int, rope_init: RopeInit) -> torch.Tensor:
    """Log-spaced from π over channels, and within a channel over heads, the same for y and x: (H,d/4,2).

    The layout is that of HDiT (arXiv 2401.11605, appendix on rotary embedding), whose range is π…10π.
    """
    channels = head_dim // 4
    low, high = math.log(math.pi), math.log(_HIGHEST_FREQUENCY[rope_init])
    steps = torch.linspace(low, high, heads * channels)
    per_head = steps.view(channels, heads).T
    return per_head.unsqueeze(-1).repeat(1, 1, 2)


def _blocks(network: nn.Module) -> list[XUTBlock]:
    return [module for module in network.modules() if isinstance(module, XUTBlock)]


def _normal(linear: nn.Linear, scale: float) -> None:
    nn.init.normal_(linear.weight, std=scale / math.sqrt(linear.in_features))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
