"""Statistics of an autoencoder's latents: moments per channel, KL, dead channels, spectrum; and latents as colors.

Shapes: image (B,3,f·H,f·W) in [-1, 1]; posterior mean and log-variance (B,C,H,W), as the encoder returns them; a
sheet (3,rows·f·H,B·f·W) in [0, 1].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over processes, which must all call it."""
DEAD_SIGNAL = 0.01
"""A channel is dead if its means carry less than this share of its total variance."""


@dataclass(frozen=True)
class LatentReport:
    """Statistics of the latents of a set of images.

    Attributes:
        mean, std: per channel, of the posterior means.
        kl: KL divergence from the standard normal per element, in nats.
        signal: per channel, the share of the total variance that the means carry, in [0, 1]: var / (var + noise).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    kl: float
    signal: tuple[float, ...]
    images: int

    @property
    def dead_channels(self) -> int:
        """Number of channels that carry (almost) no signal."""
        return sum(share < DEAD_SIGNAL for share in self.signal)


class LatentStatistics:
    """Accumulates the moments of posteriors of C channels batch by batch, in float64."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        # Rows: sum of means, of their squares, of posterior variances; the last row holds KL, elements, images.
        self._sums = torch.zeros(4, max(channels, 3), dtype=torch.float64)

    def update(self, mean: Tensor, log_variance: Tensor) -> None:
        """Add a batch (B,C,H,W)."""
        mean, log_variance = mean.detach().double().cpu(), log_variance.detach().double().cpu()
        variance = log_variance.exp()
        width = self.channels
        self._sums[0, :width] += mean.sum((0, 2, 3))
        self._sums[1, :width] += mean.square().sum((0, 2, 3))
        self._sums[2, :width] += variance.sum((0, 2, 3))
        kl = 0.5 * (mean.square() + variance - 1 - log_variance)
        self._sums[3, :3] += torch.tensor([float(kl.sum()), mean[:, 0].numel(), len(mean)], dtype=torch.float64)

    def report(self, reduce: Reduce | None = None) -> LatentReport:
        """Return the statistics of all batches. Raises ValueError: there is no image."""
        sums = reduce(self._sums) if reduce else self._sums
        kl, count, images = (float(value) for value in sums[3, :3])
        if not images:
            raise ValueError("report: no latent was added")
        first, second, noise = (sums[row, : self.channels] / count for row in range(3))
        variance = (second - first.square()).clamp(min=0)
        signal = variance / (variance + noise).clamp(min=1e-12)
        return LatentReport(
            mean=tuple(first.tolist()),
            std=tuple(variance.sqrt().tolist()),
            kl=kl / (count * self.channels),
            signal=tuple(signal.tolist()),
            images=round(images),
        )


def radial_power(latent: Tensor, bins: int = 8) -> Tensor:
    """Return the latents' power per ring of spatial frequency, summed over batch and channels (bins,), in float64.

    Ring k of `bins` covers the frequencies above k/(2·bins) up to (k+1)/(2·bins) cycles per cell; those beyond 1/2
    along the diagonals count in the last ring, and the mean of each channel is left out. Results of batches of one size
    can be added up; divided by their total they are the spectrum.
    """
    height, width = latent.shape[-2:]
    centred = latent.double() - latent.double().mean((-2, -1), keepdim=True)
    power = torch.fft.fft2(centred, norm="ortho").abs().square().sum((0, 1))
    rows = torch.fft.fftfreq(height, dtype=torch.float64, device=latent.device)[:, None]
    columns = torch.fft.fftfreq(width, dtype=torch.float64, device=latent.device)[None, :]
    frequency = (rows.square() + columns.square()).sqrt()
    ring = (torch.ceil(frequency * 2 * bins - 1e-9).long() - 1).clamp(0, bins - 1)
    rings = torch.zeros(bins, dtype=torch.float64, device=latent.device)
    return rings.index_add_(0, ring.flatten(), power.flatten())


def principal_colours(latents: Sequence[Tensor]) -> list[Tensor]:
    """Return the first three principal components of latents of several sizes as colors (B,3,H,W) in [0, 1].

    The components are computed over all positions of all latents. Each has the sign that makes its largest loading
    positive, and its 1st to 99th percentile are mapped to [0, 1]. With fewer than three channels, the remaining colors
    are 0.5.
    """
    positions = torch.cat([latent.movedim(1, -1).flatten(0, 2) for latent in latents]).detach().double()
    centred = positions - positions.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(1)[:, :3]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    values = centred @ (axes * torch.where(largest < 0, -1.0, 1.0))
    low, high = (torch.quantile(values, level, dim=0) for level in (0.01, 0.99))
    colours = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = F.pad(colours, (0, 3 - colours.shape[1]), value=0.5).float()
    shapes = [(len(latent), *latent.shape[2:], 3) for latent in latents]
    parts = colours.split([math.prod(shape[:3]) for shape in shapes])
    return [part.reshape(shape).movedim(-1, 1) for part, shape in zip(parts, shapes, strict=True)]


@torch.no_grad()
def sheet(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    image: Tensor,
    transforms: Sequence[Callable[[Tensor, int], Tensor]],
    factor: int,
) -> Tensor:
    """Return a sheet with one column per image (B,3,f·H,f·W), where f is the factor of the autoencoder.

    Rows: the image, its reconstruction, its latent as colors; then for each transform τ, which keeps or reduces the
    size: τx, D(τE(x)), and as colors the latents τE(x) and E(τx), which are equal for an equivariant encoder.
    """
    latent = encode(image)
    latents = [latent]
    rows: list[Tensor | int] = [image, decode(latent), 0]
    for transform in transforms:
        moved_image, moved_latent = transform(image, factor), transform(latent, 1)
        rows += [moved_image, decode(moved_latent), len(latents), len(latents) + 1]
        latents += [moved_latent, encode(moved_image)]
    colours = principal_colours(latents)
    cells = [colours[row] * 2 - 1 if isinstance(row, int) else row for row in rows]
    return torch.cat([_row(each, image.shape[-2:]) for each in cells], dim=1)


def _row(images: Tensor, size: torch.Size) -> Tensor:
    """Place images side by side in cells of the full size; smaller ones are enlarged without smoothing."""
    cells = F.interpolate((images.float().clamp(-1, 1) + 1) / 2, size=tuple(size), mode="nearest")
    return torch.cat(list(cells), dim=2)
