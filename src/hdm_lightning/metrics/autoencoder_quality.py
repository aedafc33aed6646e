"""Quality of an autoencoder, per image and over a set: reconstruction, equivariance, latents.

Shapes: image, output and target (B,3,H,W) in [-1, 1]; latent (B,C,H/f,W/f), the posterior's mean; a measure of each
image (B,); weight (B,), 0 for a masked sample.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from hdm_lightning.metrics.latents import LatentReport, LatentStatistics, Reduce, radial_power

Transform = Callable[[Tensor, int], Tensor]
"""τ(tensor, pixels per latent cell): the same transform of an image (f pixels per cell) and of a latent (1)."""
SPECTRUM_BINS = 8

# Five scales of an 11-pixel window: torchmetrics requires side // 16 > 10.
SMALLEST_SIDE_MS_SSIM = 176

SMALLEST_SIDE = 6
"""Smallest side in pixels for SSIM, which mirrors 5 pixels at the edges."""

IMAGE_MEASURES = ("l1", "ms_ssim", "psnr_db", "ssim")


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB per sample (B,); 100 if they are equal."""
    error = (output.clamp(-1, 1) - target).div(2).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-10))


def image_quality(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return each of `IMAGE_MEASURES` per sample (B,); `ms_ssim` only if all sides have at least 176 pixels."""
    output = output.clamp(-1, 1)
    # Published SSIM is on [0, 1]; around zero its comparison of means would differ.
    levels = (output + 1) / 2, (target + 1) / 2
    one_scale = structural_similarity_index_measure(*levels, data_range=1.0, reduction="none")
    values = {
        "psnr_db": psnr(output, target),
        "l1": (output - target).abs().flatten(1).mean(1),
        "ssim": _per_sample(one_scale, target),
    }
    if min(target.shape[-2:]) >= SMALLEST_SIDE_MS_SSIM:
        scales = multiscale_structural_similarity_index_measure(*levels, data_range=1.0, reduction="none")
        values["ms_ssim"] = _per_sample(scales, target)
    return values


def _per_sample(value: Tensor | tuple[Tensor, Tensor], image: Tensor) -> Tensor:
    """Narrow torchmetrics' return type, which also allows for similarity maps (not requested here)."""
    assert isinstance(value, Tensor)
    return value.reshape(len(image))


def relative_error(value: Tensor, reference: Tensor) -> Tensor:
    """Return ‖value − reference‖ / ‖reference‖ per sample (B,)."""
    return _norm(value - reference) / _norm(reference).clamp(min=1e-12)


class CentredError:
    """The encoder's equivariance error relative to the spread of the latents, accumulated batch by batch in float64.

    Per channel, the mean squared difference of τE(x) and E(τx) over the variance of E(τx); then the root of the mean
    over channels. Unlike the ratio of norms it does not fall if a channel's mean is far from zero or one channel
    outweighs the others, so it can compare autoencoders. 0 is equivariant; unrelated latents have √2.
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

    def report(self, reduce: Reduce | None = None) -> float:
        """Return the error."""
        difference, first, second, count = reduce(self._sums) if reduce else self._sums
        variance = (second / count - (first / count).square()).clamp(min=1e-24)
        return float((difference / count / variance).mean().sqrt())


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1)


class AutoencoderMeasures:
    """Reconstruction, equivariance and latent statistics of one autoencoder.

    Args:
        posterior: maps an image to the posterior's (mean, log-variance).
        decode: maps a latent to an image.
        channels: C.
        factor: f, pixels per latent cell.
        transforms: by name of a group (such as "scale"), the transforms that its errors are averaged over, by names of
            their own (such as "0.50"); the encoder's error of each is reported too.
        perceptual: distance (B,) of two batches of images, or None.
        perceptual_name: name of that distance in the report.
    """

    def __init__(
        self,
        posterior: Callable[[Tensor], tuple[Tensor, Tensor]],
        decode: Callable[[Tensor], Tensor],
        *,
        channels: int,
        factor: int,
        transforms: Mapping[str, Mapping[str, Transform]],
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        perceptual_name: str = "perceptual",
    ) -> None:
        self.posterior, self.decode, self.factor = posterior, decode, factor
        self.transforms = {name: dict(each) for name, each in transforms.items() if each}
        self.perceptual, self.perceptual_name = perceptual, perceptual_name
        self.latents = LatentStatistics(channels)
        self.centred = {name: CentredError(channels) for name in self.transforms}
        self._names = self._all_names()
        # Rows: sums over images, and the number of images behind each measure. The shape never depends on what was
        # measured, so a process without an image can take part in a sum over processes.
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64)
        self._power = torch.zeros(SPECTRUM_BINS, dtype=torch.float64)

    @torch.no_grad()
    def update(
        self, image: Tensor, weight: Tensor | None = None, *, cut: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Measure a batch; return the measures that exist per image, name to (B,) without masked samples.

        Args:
            image: its sides must be multiples of the factor, padded if need be.
            weight: 0 for a masked sample; None counts all.
            cut: height and width of the images before padding, to which reconstructions are cropped.

        Raises:
            ValueError: a side of the image is not a multiple of the factor.
        """
        if any(side % self.factor for side in image.shape[-2:]):
            size = "×".join(map(str, image.shape[-2:]))
            raise ValueError(f"image: got {size} px, expected sides that are multiples of {self.factor}; pad or crop")
        if weight is not None:
            image = image[weight > 0]
        if not len(image):
            return {}
        mean, log_variance = self.posterior(image)
        decoded = self.decode(mean)
        self.latents.update(mean, log_variance)
        self._power += radial_power(mean, SPECTRUM_BINS).cpu()
        values = self._reconstruction(_cut(decoded, cut), _cut(image, cut)) | self._equivariance(image, mean, decoded)
        for name, value in values.items():
            sum_and_count = torch.tensor([float(value.double().sum()), len(value)], dtype=torch.float64)
            self._sums[:, self._names.index(name)] += sum_and_count
        return values

    def report(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Return the mean of every measure over the images, and the measures of the set as a whole.

        Raises ValueError: no process has measured an image.
        """
        latents = self.latent_report(reduce)
        packed = torch.cat([self._sums.flatten(), self._power])
        total = reduce(packed) if reduce else packed
        sums, counts = total[:-SPECTRUM_BINS].reshape(2, -1)
        means = zip(self._names, (sums / counts).tolist(), counts.tolist(), strict=True)
        report = {name: mean for name, mean, count in means if count}
        for name, error in self.centred.items():
            report[f"equivariance/encoder_{name}_centred"] = error.report(reduce)
        shares = total[-SPECTRUM_BINS:] / total[-SPECTRUM_BINS:].sum().clamp(min=1e-30)
        report |= {f"latent/spectrum_{ring}": share for ring, share in enumerate(shares.tolist())}
        report["latent/kl"] = latents.kl
        report["latent/dead_channels"] = float(latents.dead_channels)
        return report

    def latent_report(self, reduce: Reduce | None = None) -> LatentReport:
        """Return the statistics of the latents."""
        return self.latents.report(reduce)

    def _all_names(self) -> list[str]:
        """Return the names of all measures that exist per image."""
        reconstruction = [*IMAGE_MEASURES, *([self.perceptual_name] if self.perceptual else [])]
        moved = [f"{key}_{name}" for name in self.transforms for key in ("decoder", "encoder", "psnr_db")]
        moved += [f"encoder_{name}_{each}" for name, group in self.transforms.items() for each in group]
        return sorted([*(f"reconstruction/{key}" for key in reconstruction), *(f"equivariance/{key}" for key in moved)])

    def _reconstruction(self, output: Tensor, image: Tensor) -> dict[str, Tensor]:
        values = image_quality(output, image)
        if self.perceptual is not None:
            values[self.perceptual_name] = self.perceptual(output.clamp(-1, 1), image)
        return {f"reconstruction/{name}": value for name, value in values.items()}

    def _equivariance(self, image: Tensor, mean: Tensor, decoded: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, group in self.transforms.items():
            measured = {each: self._one_transform(name, group[each], image, mean, decoded) for each in group}
            for key in ("encoder", "decoder", "psnr_db"):
                values[f"equivariance/{key}_{name}"] = torch.stack([each[key] for each in measured.values()]).mean(0)
            values |= {f"equivariance/encoder_{name}_{each}": found["encoder"] for each, found in measured.items()}
        return values

    def _one_transform(
        self, name: str, transform: Transform, image: Tensor, mean: Tensor, decoded: Tensor
    ) -> dict[str, Tensor]:
        """Return encoder and decoder errors for τ (arXiv 2502.09509, section 3), and the PSNR of D(τE(x)) with τx."""
        moved_image, moved_latent = transform(image, self.factor), transform(mean, 1)
        latent_of_moved = self.posterior(moved_image)[0]
        self.centred[name].update(moved_latent, latent_of_moved)
        decoded_moved = self.decode(moved_latent)
        return {
            "encoder": relative_error(moved_latent, latent_of_moved),
            "decoder": relative_error(decoded_moved, transform(decoded, self.factor)),
            "psnr_db": psnr(decoded_moved, moved_image),
        }


def _cut(image: Tensor, size: tuple[int, int] | None) -> Tensor:
    return image if size is None else image[..., : size[0], : size[1]]
