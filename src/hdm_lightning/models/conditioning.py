"""From timestep and aspect ratio to the modulation that all blocks share.

Shapes: B batch, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdm_lightning.models.attention import Linear


class Modulation(NamedTuple):
    """Shared adaLN of one kind of sublayer: n ← norm(x)·gain + shift, output·gate; each (B,1,D)."""

    gain: Tensor
    shift: Tensor
    gate: Tensor


class BlockModulation(NamedTuple):
    """The modulations of a block's sublayers; `cross_attention` is None if no block of the network has one."""

    self_attention: Modulation
    cross_attention: Modulation | None
    feed_forward: Modulation


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of 1000·t, then Linear and Mish."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = Linear(width, width)
        self.register_buffer("frequencies", time_frequencies(width).to(self.projection.weight.device))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) in [0, 1] to (B,D)."""
        angles = (1000 * t.to(self.frequencies.dtype)).unsqueeze(1) * self.frequencies
        features = torch.cat((angles.cos(), angles.sin()), dim=1)
        return F.mish(self.projection(features.to(self.projection.weight.dtype)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TimeEmbedding:
        # 1000·t times a half-precision frequency is off by up to a radian, so the table stays at least
        # float32, whatever dtype the network is cast to.
        exact = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype.itemsize < 4:
            self.frequencies = exact.to(self.frequencies.device)
        return self


def time_frequencies(width: int) -> Tensor:
    """Return exp(−ln 10000·i/(D/2)) for i < D/2, in float32, rounded once, on the CPU."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device="cpu") * (-math.log(10000) / half)
    return exponents.exp().float()


class AspectRatioEmbedding(nn.Module):
    """Map log(W/H) to a vector that is added to the time embedding; zero at initialization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = Linear(1, width)
        self.output = Linear(width, width)

    def forward(self, log_aspect_ratio: Tensor) -> Tensor:
        """(B,) to (B,D)."""
        column = log_aspect_ratio.to(self.input.weight.dtype).unsqueeze(1)
        return self.output(F.mish(self.input(column)))


class AdaptiveNorm(nn.Module):
    """Map the conditioning vector to the modulation of one kind of sublayer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = Linear(width, 4 * width)
        self.output = Linear(4 * width, 3 * width)

    def forward(self, condition: Tensor) -> Modulation:
        """(B,D) to gain, shift and gate, with gain and gate around 1; in at least float32, even under autocast.

        Above 1, bfloat16 has steps of 2⁻⁷, and every block uses the same numbers, so their errors would add up.
        """
        dtype = torch.promote_types(condition.dtype, torch.float32)
        with torch.autocast(autocast_device(condition), enabled=False):
            norm = self.norm
            normed = F.layer_norm(
                condition.to(dtype), norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps
            )
            mixed = _exact(self.output, F.mish(_exact(self.hidden, normed))).unsqueeze(1)
            scale, shift, gate = mixed.chunk(3, dim=-1)
            return Modulation(1 + scale, shift, 1 + gate)


def _exact(layer: nn.Linear, values: Tensor) -> Tensor:
    """Apply a layer in the dtype of its input; an adapter in its place computes in the dtype of its own weights."""
    if layer.weight.dtype == values.dtype:
        return layer(values)
    if type(layer) is not Linear:
        return layer(values.to(layer.weight.dtype)).to(values.dtype)
    return F.linear(values, layer.weight.to(values.dtype), layer.bias.to(values.dtype))


def autocast_device(tensor: Tensor) -> str:
    """Return the device type to pass to `torch.autocast` for a tensor.

    The meta device, used to count shapes and operations, has no autocast, so any other type will do. Asking torch
    which devices support autocast would break the graph: the compiler of torch 2.11 cannot trace that call.
    """
    kind = tensor.device.type
    return "cpu" if kind == "meta" else kind


class SharedModulation(nn.Module):
    """One adaptive norm per kind of sublayer, shared by the whole network (arXiv 2509.06068, shared adaLN)."""

    def __init__(self, width: int, *, cross_attention: bool = True) -> None:
        super().__init__()
        self.self_attention = AdaptiveNorm(width)
        self.cross_attention = AdaptiveNorm(width) if cross_attention else None
        self.feed_forward = AdaptiveNorm(width)

    def forward(self, condition: Tensor) -> BlockModulation:
        """(B,D) to the modulations that all blocks share."""
        cross = None if self.cross_attention is None else self.cross_attention(condition)
        return BlockModulation(self.self_attention(condition), cross, self.feed_forward(condition))
