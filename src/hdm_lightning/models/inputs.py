"""Check the arguments of XUT.forward, naming them in messages, and convert latents to tokens and back.

Shapes: B batch, C channels, H×W latent, p patch, L text tokens, N image tokens, K kept tokens.
Checks of values (not of shapes) read the tensor, so they run only on CPU tensors and outside compilation: an
accelerator would have to synchronize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hdm_lightning.models.config import XUTConfig


def check_latent(latent: Tensor, config: XUTConfig) -> None:
    """Raise ValueError unless the latent is (B,C,H,W) with H and W divisible by the patch."""
    if latent.dim() != 4 or latent.shape[1] != config.channels or 0 in latent.shape:
        raise ValueError(f"latent has shape {tuple(latent.shape)}; expected (B, {config.channels}, H, W)")
    height, width = latent.shape[2:]
    if height % config.patch_size or width % config.patch_size:
        raise ValueError(f"latent has size {height}x{width}; expected multiples of the patch size {config.patch_size}")


def check_conditions(
    batch: int, t: Tensor, context: Tensor, log_aspect_ratio: Tensor | None, config: XUTConfig
) -> None:
    """Raise ValueError unless t is (B,) and finite, the context (B,L,ctx), and the log aspect ratio (B,) or None."""
    if t.shape != (batch,):
        raise ValueError(f"t has shape {tuple(t.shape)}; expected ({batch},)")
    if _readable(t) and not bool(torch.isfinite(t).all()):
        raise ValueError(f"t is {t.tolist()}; expected finite timesteps in [0, 1]")
    if context.dim() != 3 or context.shape[0] != batch or context.shape[2] != config.context_width:
        raise ValueError(f"context has shape {tuple(context.shape)}; expected ({batch}, L, {config.context_width})")
    if log_aspect_ratio is not None and log_aspect_ratio.shape != (batch,):
        raise ValueError(f"log_aspect_ratio has shape {tuple(log_aspect_ratio.shape)}; expected ({batch},)")


def check_context_lengths(lengths: Tensor, batch: int, text: int) -> None:
    """Raise ValueError unless the lengths are (B,) integers in [0, L]."""
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"context_lengths has shape {tuple(lengths.shape)} and dtype {lengths.dtype}; expected ({batch},) integers"
        )
    if _readable(lengths) and bool(((lengths < 0) | (lengths > text)).any()):
        raise ValueError(f"context_lengths is {lengths.tolist()}; expected values from 0 to {text}")


def check_positions(positions: Tensor, batch: int, tokens: int) -> None:
    """Raise ValueError unless the positions are (B or 1,N,2)."""
    if positions.dim() != 3 or positions.shape[0] not in (1, batch) or positions.shape[1:] != (tokens, 2):
        raise ValueError(f"token_positions has shape {tuple(positions.shape)}; expected ({batch} or 1, {tokens}, 2)")


def kept_indices(keep: Tensor, batch: int, tokens: int) -> Tensor | None:
    """Return ``keep`` as (B,K) int64 indices, or None if it keeps every token.

    Raises:
        ValueError: `keep` is neither (B,K) int64 nor (B,N) bool, its rows keep different numbers of tokens, or a row
            has an index that is out of range or repeated.
    """
    if keep.dtype == torch.bool:
        return _indices_of_mask(keep, batch, tokens)
    if keep.dim() != 2 or keep.shape[0] != batch or keep.dtype != torch.int64:
        raise ValueError(
            f"keep has shape {tuple(keep.shape)} and dtype {keep.dtype}; expected ({batch}, K) int64 indices or "
            f"({batch}, {tokens}) bool"
        )
    if not 1 <= keep.shape[1] <= tokens:
        raise ValueError(f"keep has {keep.shape[1]} indices per row; expected 1 to {tokens}")
    if _readable(keep):
        ordered = keep.sort(dim=1).values
        if bool((ordered[:, 0] < 0).any() | (ordered[:, -1] >= tokens).any()):
            raise ValueError(f"keep has indices {int(keep.min())} to {int(keep.max())}; expected 0 to {tokens - 1}")
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise ValueError("keep has a repeated index in a row; expected distinct indices")
    return None if keep.shape[1] == tokens else keep


def patchify(latent: Tensor, patch: int) -> Tensor:
    """(B,C,H,W) to (B,N,C·p·p), channel slowest, in the order of a convolution's weight."""
    batch, channels, height, width = latent.shape
    grid = latent.view(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """(B,N,p·p·C), channel fastest, to (B,C,H,W)."""
    batch = tokens.shape[0]
    grid = tokens.view(batch, height // patch, width // patch, patch, patch, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


def _indices_of_mask(keep: Tensor, batch: int, tokens: int) -> Tensor | None:
    if keep.shape != (batch, tokens):
        raise ValueError(f"keep has shape {tuple(keep.shape)} and dtype bool; expected ({batch}, {tokens})")
    counts = keep.sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"keep has rows with counts {counts}; expected the same count in every row")
    if counts[0] == 0:
        raise ValueError("keep selects no tokens; expected at least 1 per row")
    if counts[0] == tokens:
        return None
    return keep.nonzero()[:, 1].view(batch, counts[0])


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
