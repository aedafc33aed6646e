"""Token routing of TREAD (arXiv 2501.04765): choose the image tokens that pass through the U, gather and scatter them.

Shapes: B batch, N image tokens, L text tokens, K kept image tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tokens_kept(tokens: int, rate: float) -> int:
    """Return K = N − int(rate·N), the number of image tokens that pass through the U.

    Raises:
        ValueError: the rate is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}; expected the share of tokens that skip the U, at least 0 and below 1")
    return tokens - int(rate * tokens)


def keep_from_scores(scores: Tensor, rate: float) -> Tensor:
    """Return the K tokens with the highest scores in each row.

    With uniform scores this is a uniform choice without replacement; scores drawn per sample make it independent
    of how samples are distributed over ranks.

    Args:
        scores: (B,N) floating point, distinct within a row.
        rate: share γ of tokens that skip the U, in [0, 1).

    Returns:
        (B,K) int64 indices, ascending in each row, K = N − int(γ·N).
    """
    if scores.dim() != 2:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; expected (B, N)")
    kept = tokens_kept(scores.shape[1], rate)
    return scores.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values


def random_keep(
    batch: int,
    tokens: int,
    rate: float,
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Choose K = N − int(γ·N) image tokens of each sample uniformly at random.

    Args:
        batch: B.
        tokens: N.
        rate: share γ of tokens that skip the U, in [0, 1).
        generator: source of randomness; the indices are created on its device.
        device: device of the indices if there is no generator.

    Returns:
        (B,K) int64 indices, ascending in each row.
    """
    where = generator.device if generator is not None else device
    return keep_from_scores(torch.rand(batch, tokens, generator=generator, device=where), rate)


def with_text(keep: Tensor, tokens: int, text: int) -> Tensor:
    """Return indices (B,K) of image tokens followed by those of all text tokens: (B,K+L)."""
    behind = torch.arange(tokens, tokens + text, device=keep.device).expand(keep.shape[0], -1)
    return torch.cat((keep, behind), dim=1)


def gather_tokens(sequence: Tensor, indices: Tensor) -> Tensor:
    """Return the rows of (B or 1,S,F) at indices (B,K), distinct in each row: (B,K,F)."""
    gathered: Tensor = _GatherDistinct.apply(sequence.expand(indices.shape[0], -1, -1), indices)
    return gathered


class _GatherDistinct(torch.autograd.Function):
    """`Tensor.gather` of whole rows with a backward pass that writes each gradient instead of adding it.

    Torch must add them, with atomic operations on a GPU, since an index could be repeated.
    """

    @staticmethod
    def forward(sequence: Tensor, indices: Tensor) -> Tensor:
        return sequence.gather(1, _of_rows(indices, sequence.shape[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        sequence, indices = inputs
        ctx.tokens = sequence.shape[1]
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        batch, _, features = gradient.shape
        empty = gradient.new_zeros(batch, ctx.tokens, features)
        return empty.scatter(1, _of_rows(indices, features), gradient), None


def _of_rows(indices: Tensor, features: int) -> Tensor:
    return indices.unsqueeze(-1).expand(-1, -1, features)


def scatter_tokens(sequence: Tensor, indices: Tensor, routed: Tensor) -> Tensor:
    """Return a copy of (B,S,D) with the rows at indices (B,K) replaced by (B,K,D)."""
    return sequence.scatter(1, _of_rows(indices, routed.shape[-1]), routed.to(sequence.dtype))
