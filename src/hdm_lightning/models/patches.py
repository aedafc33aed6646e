"""Between a latent and its tokens.

Shapes: B batch, C channels, H×W latent, p patch, h = H/p, w = W/p, N = h·w.
"""

from __future__ import annotations

from torch import Tensor


def patchify(latent: Tensor, patch: int) -> Tensor:
    """(B,C,H,W) to (B,N,C·p·p), channel slowest, as a convolution's weight lies."""
    batch, channels, height, width = latent.shape
    grid = latent.view(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """(B,N,p·p·C), channel fastest, to (B,C,H,W)."""
    batch = tokens.shape[0]
    grid = tokens.view(batch, height // patch, width // patch, patch, patch, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)
