"""How far an autoencoder is from commuting with geometric transforms, on the encoder's and the decoder's side.

Shapes: image (B,3,f·H,f·W) in [-1, 1]; latent (B,C,H,W), the posterior's mean.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Transform = Callable[[Tensor, int], Tensor]
"""τ(tensor, pixels per latent cell): the same transform of an image (f pixels per cell) and of a latent (1)."""


def relative_error(value: Tensor, reference: Tensor) -> Tensor:
    """Return ‖value − reference‖ / ‖reference‖ per sample (B,)."""
    return _norm(value - reference) / _norm(reference).clamp(min=1e-12)


class CentredError:
    """The encoder's equivariance error against the spread of the latents, summed up batch by batch in float64.

    Per channel, the mean squared difference of τE(x) and E(τx) over the variance of E(τx); then the root of the mean
    over channels. Unlike the ratio of norms it does not fall when a channel's mean is far from zero, nor when one
    channel outweighs the others, so that it compares autoencoders. 0 is equivariant; √2 is what unrelated latents have.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        # Rows: squared differences, latents, their squares; the last row holds the count.
        self._sums = torch.zeros(4, channels, dtype=torch.float64)

    def update(self, moved_latent: Tensor, latent_of_moved: Tensor) -> None:
        """Add a batch of τE(x) and E(τx), both (B,C,H,W)."""
        moved, other = moved_latent.detach().double().cpu(), latent_of_moved.detach().double().cpu()
        self._sums[0] += (moved - other).square().sum((0, 2, 3))
        self._sums[1] += other.sum((0, 2, 3))
        self._sums[2] += other.square().sum((0, 2, 3))
        self._sums[3] += other[:, 0].numel()

    def report(self, reduce: Callable[[Tensor], Tensor] | None = None) -> float:
        """Return the error; `reduce` adds the packed sums up over processes."""
        difference, first, second, count = self._sums if reduce is None else reduce(self._sums)
        variance = (second / count - (first / count).square()).clamp(min=1e-24)
        return float((difference / count / variance).mean().sqrt())


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1)
