"""Coordinate check (arXiv 2203.03466, appendix D.1): do activations keep their scale as the width grows?

A few optimizer steps on one fixed batch, at each width; under a rule that transfers between widths, the scale of
every activation after k steps is the same at all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.training.optimization.learning_rates import parameter_groups


@dataclass(frozen=True)
class CoordinateCheck:
    """Settings of the training at each width.

    Args:
        rule: a learning-rate rule of `parameter_groups`.
        base_learning_rate: its base rate.
        steps: optimizer steps, at a constant rate.
        batch: samples in the fixed batch.
        side: latent side in cells.
        text: text tokens.
        head_dim: channels per head; the number of heads grows with the width.
        wiring: further fields of `XUTConfig`.
    """

    rule: str = "mup"
    base_learning_rate: float = 0.5
    steps: int = 8
    batch: int = 8
    side: int = 8
    text: int = 6
    head_dim: int = 16
    wiring: Mapping[str, Any] | None = None

    def scales(self, width: int, seed: int) -> dict[str, list[float]]:
        """Return the root mean square of each named activation before each step and after the last one."""
        torch.manual_seed(seed)
        network = XUT(self._config(width))
        latent, t, context, target = self._batch(seed)
        groups = parameter_groups(network, self.base_learning_rate, 0.0, rule=self.rule)
        optimizer = AdamW(groups, betas=(0.9, 0.98), fused=True)  # type: ignore[arg-type]
        scales: dict[str, list[float]] = {}
        _record(network, scales)
        for _ in range(self.steps):
            loss = (network(latent, t, context) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            network(latent, t, context)
        return scales

    def _config(self, width: int) -> XUTConfig:
        shape = {"width": width, "mlp_width": 2 * width, "heads": width // self.head_dim, "head_dim": self.head_dim}
        blocks = {"depth": 1, "encoder_blocks": 1, "decoder_blocks": 1, "blocks_before": 1, "blocks_after": 1}
        return XUTConfig.from_json({**shape, **blocks, "context_width": 32, **(self.wiring or {})})

    def _batch(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return noisy latents whose velocity has smooth structure, the same for every width."""
        draw = torch.Generator().manual_seed(seed + 1)
        coarse = torch.randn(self.batch, 4, 2, 2, generator=draw)
        clean = nn.functional.interpolate(coarse, size=(self.side, self.side), mode="bilinear")
        noise = torch.randn(clean.shape, generator=draw)
        t = torch.randn(self.batch, generator=draw).sigmoid()
        mix = t[:, None, None, None]
        context = torch.randn(self.batch, self.text, 32, generator=draw)
        return mix * noise + (1 - mix) * clean, t, context, noise - clean


def width_exponent(widths: Sequence[int], scales: Sequence[float]) -> float:
    """Return the least-squares slope of log(scale) against log(width); 0 if the scale does not depend on the width."""
    x = [math.log(width) for width in widths]
    y = [math.log(scale) for scale in scales]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def _record(network: XUT, scales: dict[str, list[float]]) -> None:
    """Append the root mean squares of the activations of interest in every forward pass."""
    watched: dict[str, nn.Module] = {
        "patch embedding": network.patch_embedding,
        "time embedding": network.time_embedding,
        "modulation": network.modulation.self_attention.output,
        "velocity": network.output_projection,
    }
    watched |= {f"block {number}": block for number, block in enumerate(network.blocks())}
    for name, module in watched.items():
        values = scales.setdefault(name, [])

        def append(_module: nn.Module, _args: Any, output: Tensor, values: list[float] = values) -> None:
            values.append(output.detach().square().mean().sqrt().item())

        module.register_forward_hook(append)
