"""Token routing of TREAD (arXiv 2501.04765): which image tokens pass through the U, there and back.

Shapes: B batch, N image tokens, L text tokens, K kept image tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tokens_kept(tokens: int, rate: float) -> int:
    """K = N − int(rate·N), the image tokens that pass through the U.

    Raises:
        ValueError: the rate is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}; expected the share that skips, at least 0 and below 1")
    return tokens - int(rate * tokens)


def keep_from_scores(scores: Tensor, rate: float) -> Tensor:
    """The K tokens of each row with the highest scores.

    With uniform scores this is a uniform choice without replacement; scores drawn per sample make the choice
    independent of how samples are spread over ranks.

    Args:
        scores: (B,N) floating, distinct within a row.
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
    """A uniform random choice of K = N − int(γ·N) image tokens for each sample.

    Args:
        batch: B.
        tokens: N.
        rate: share γ of tokens that skip the U, in [0, 1).
        generator: source of randomness; its device is where the indices are made.
        device: where to make them without a generator.

    Returns:
        (B,K) int64 indices, ascending in each row.
    """
    where = generator.device if generator is not None else device
    return keep_from_scores(torch.rand(batch, tokens, generator=generator, device=where), rate)


def with_text(keep: Tensor, tokens: int, text: int) -> Tensor:
    """Indices (B,K) into image tokens, extended by all text tokens, which lie behind them: (B,K+L)."""
    behind = torch.arange(tokens, tokens + text, device=keep.device).expand(keep.shape[0], -1)
    return torch.cat((keep, behind), dim=1)


def gather_tokens(sequence: Tensor, indices: Tensor) -> Tensor:
    """Rows of (B or 1,S,F) at (B,K): (B,K,F)."""
    features = sequence.shape[-1]
    rows = sequence.expand(indices.shape[0], -1, -1)
    return rows.gather(1, indices.unsqueeze(-1).expand(-1, -1, features))


def scatter_tokens(sequence: Tensor, indices: Tensor, routed: Tensor) -> Tensor:
    """A copy of (B,S,D) with the rows at (B,K) replaced by (B,K,D)."""
    return sequence.scatter(1, indices.unsqueeze(-1).expand_as(routed), routed.to(sequence.dtype))
