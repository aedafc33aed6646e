"""What an autoencoder does, as one image: reconstructions, decoded moved latents, latents as colours.

Shapes: image (B,3,f·H,f·W) in [-1, 1]; latent (B,C,H,W); a sheet (3,rows·f·H,B·f·W) in [0, 1].
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hdm_lightning.metrics.equivariance import Transform
from hdm_lightning.metrics.latents import principal_colours


@torch.no_grad()
def sheet(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    image: Tensor,
    transforms: Sequence[Transform],
    factor: int,
) -> Tensor:
    """Return a sheet with one column per image.

    Rows: the image, its reconstruction, its latent as colours; then for each transform τ: τx, D(τE(x)), and the
    latents τE(x) and E(τx) as colours, which an equivariant encoder makes alike.

    Args:
        encode: image to posterior mean.
        decode: latent to image.
        image: (B,3,f·H,f·W) in [-1, 1].
        transforms: any that keep or reduce the size.
        factor: f.
    """
    latent = encode(image)
    latents = [latent]
    rows: list[Tensor | int] = [image, decode(latent), 0]
    for transform in transforms:
        moved_image, moved_latent = transform(image, factor), transform(latent, 1)
        rows += [moved_image, decode(moved_latent), len(latents), len(latents) + 1]
        latents += [moved_latent, encode(moved_image)]
    colours = _coloured(latents)
    cells = [colours[row] * 2 - 1 if isinstance(row, int) else row for row in rows]
    return torch.cat([_row(each, image.shape[-2:]) for each in cells], dim=1)


def _coloured(latents: Sequence[Tensor]) -> list[Tensor]:
    """Colours of latents of several sizes by common components: the flattened positions are taken together."""
    flat = [latent.flatten(2) for latent in latents]
    together = torch.cat([each.movedim(1, 2).reshape(-1, each.shape[1]) for each in flat])
    colours = principal_colours(together.T[None, :, :, None])[0, :, :, 0].T
    parts = colours.split([each.shape[0] * each.shape[2] for each in flat])
    return [
        part.reshape(latent.shape[0], *latent.shape[-2:], 3).movedim(-1, 1)
        for part, latent in zip(parts, latents, strict=True)
    ]


def _row(images: Tensor, size: torch.Size) -> Tensor:
    """Images side by side in cells of the full size, smaller ones enlarged without smoothing."""
    cells = F.interpolate((images.float().clamp(-1, 1) + 1) / 2, size=tuple(size), mode="nearest")
    return torch.cat(list(cells), dim=2)
