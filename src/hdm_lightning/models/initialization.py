"""Initial values of the parameters of an XUT, one explicit line per kind.

Matrices are normal with standard deviation 1/√fan_in, so that the scale of activations does not depend on the
width. The last matrix of each residual branch is also divided by √(number of sublayers), so that the sum over
branches stays of order one. Zero: all biases, the adaLN outputs (modulation starts at the identity), the
aspect-ratio output (the aspect ratio has no effect at first) and the output projection (the first velocity is 0,
and under muP an output layer may start at zero at any width).
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
def initialize(network: nn.Module, rope_init: RopeInit, output: nn.Linear) -> None:
    """Fill every parameter of an XUT with this output projection in place; does nothing on the meta device.

    The values are drawn from torch's default generator.
    """
    if next(network.parameters()).is_meta:
        return
    sublayers = sum(3 if block.reads_memory else 2 for block in network.modules() if isinstance(block, XUTBlock))
    for module in network.modules():
        _fill(module)
    for module in network.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.log_frequencies.copy_(log_frequencies(module.heads, module.head_dim, rope_init))
        if isinstance(module, SelfAttention | CrossAttention | SwiGLU):
            module.output.weight.div_(math.sqrt(sublayers))
        if isinstance(module, AdaptiveNorm | AspectRatioEmbedding):
            module.output.weight.zero_()
    output.weight.zero_()


def log_frequencies(heads: int, head_dim: int, rope_init: RopeInit) -> torch.Tensor:
    """Return (H,d/4,2), log-spaced from π over channels and, within a channel, over heads; the same for y and x.

    The spread over heads and channels follows HDiT (arXiv 2401.11605), which uses the range π…10π.
    """
    channels = head_dim // 4
    low, high = math.log(math.pi), math.log(_HIGHEST_FREQUENCY[rope_init])
    steps = torch.linspace(low, high, heads * channels)
    per_head = steps.view(channels, heads).T
    return per_head.unsqueeze(-1).repeat(1, 1, 2)


def _fill(module: nn.Module) -> None:
    """Set a module's own parameters to the initial values of its kind."""
    if isinstance(module, nn.Linear):
        module.weight.normal_(std=1 / math.sqrt(module.in_features))
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.LayerNorm):
        module.weight.fill_(1)
        module.bias.zero_()
    elif isinstance(module, ModulatedNorm):
        module.weight.fill_(1)
