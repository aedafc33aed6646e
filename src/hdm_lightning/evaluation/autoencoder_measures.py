"""All measures of an autoencoder over a set of images, added up batch by batch.

Shapes: image (B,3,H,W) in [-1, 1]; latent (B,C,H/f,W/f); weight (B,), 0 for a hole.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from hdm_lightning.evaluation.autoencoder_equivariance import (
    Transform,
    decoder_error,
    encoder_error,
    moved_psnr,
    psnr,
)
from hdm_lightning.evaluation.autoencoder_latents import LatentReport, LatentStatistics, radial_spectrum

# Five scales of an 11-pixel window: torchmetrics wants more than 10 whole sixteenths a side.
_SMALLEST_SIDE_MS_SSIM = 176
SPECTRUM_BINS = 8

Reduce = Callable[[Tensor], Tensor]


class AutoencoderMeasures:
    """Reconstruction, equivariance and latent statistics of one autoencoder.

    Args:
        posterior: image to the posterior's (mean, log-variance).
        decode: latent to image.
        channels: C.
        factor: f, pixels per latent cell.
        transforms: name (such as "rotation") to the transforms that its equivariance errors are averaged over.
        perceptual: distance (B,) of two batches of images, or None.
        perceptual_name: what that distance is, for the report.
    """

    def __init__(
        self,
        posterior: Callable[[Tensor], tuple[Tensor, Tensor]],
        decode: Callable[[Tensor], Tensor],
        *,
        channels: int,
        factor: int,
        transforms: Mapping[str, Sequence[Transform]],
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        perceptual_name: str = "perceptual",
    ) -> None:
        self.posterior, self.decode, self.factor = posterior, decode, factor
        self.transforms = transforms
        self.perceptual, self.perceptual_name = perceptual, perceptual_name
        self.latents = LatentStatistics(channels)
        self._sums: dict[str, float] = {}
        self._weight = 0.0

    @torch.no_grad()
    def update(self, image: Tensor, weight: Tensor | None = None) -> None:
        """Measure a batch; every process of a run must see the same image size."""
        if weight is not None:
            image = image[weight > 0]
        if not len(image):
            return
        mean, log_variance = self.posterior(image)
        self.latents.update(mean, log_variance)
        output = self.decode(mean)
        values = self._reconstruction(output, image) | self._equivariance(image, mean)
        for ring, share in enumerate(radial_spectrum(mean, SPECTRUM_BINS).tolist()):
            values[f"latent/spectrum_{ring}"] = torch.full((len(image),), share)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.double().sum())
        self._weight += len(image)

    def report(self, names: Sequence[str] | None = None, reduce: Reduce | None = None) -> dict[str, float]:
        """Return every measure's mean over the images.

        Args:
            names: measures to report, the same in the same order on every process; None for all.
            reduce: adds a tensor up over processes.
        """
        keys = sorted(self._sums) if names is None else list(names)
        packed = torch.tensor([self._weight, *(self._sums.get(key, 0.0) for key in keys)], dtype=torch.float64)
        total = packed if reduce is None else reduce(packed)
        report = {key: float(value / total[0]) for key, value in zip(keys, total[1:], strict=True)}
        latents = self.latent_report(reduce)
        report["latent/kl"] = latents.kl
        report["latent/dead_channels"] = float(latents.dead_channels)
        return report

    def latent_report(self, reduce: Reduce | None = None) -> LatentReport:
        """Return mean and standard deviation per channel and what follows from them."""
        return self.latents.report() if reduce is None else self.latents.report(reduce)

    def _reconstruction(self, output: Tensor, image: Tensor) -> dict[str, Tensor]:
        output = output.clamp(-1, 1)
        values = {
            "reconstruction/psnr_db": psnr(output, image),
            "reconstruction/l1": (output - image).abs().flatten(1).mean(1),
            "reconstruction/ssim": _per_sample(
                structural_similarity_index_measure(output, image, data_range=2.0, reduction="none"), image
            ),
        }
        if min(image.shape[-2:]) >= _SMALLEST_SIDE_MS_SSIM:
            values["reconstruction/ms_ssim"] = _per_sample(
                multiscale_structural_similarity_index_measure(output, image, data_range=2.0, reduction="none"), image
            )
        if self.perceptual is not None:
            values[f"reconstruction/{self.perceptual_name}"] = self.perceptual(output, image)
        return values

    def _equivariance(self, image: Tensor, mean: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, transforms in self.transforms.items():
            measured = [self._one_transform(image, mean, transform) for transform in transforms]
            for key in measured[0] if measured else ():
                values[f"equivariance/{key}_{name}"] = torch.stack([each[key] for each in measured]).mean(0)
        return values

    def _one_transform(self, image: Tensor, mean: Tensor, transform: Transform) -> dict[str, Tensor]:
        def encode(pixels: Tensor) -> Tensor:
            return mean if pixels is image else self.posterior(pixels)[0]

        return {
            "encoder": encoder_error(encode, image, transform, self.factor),
            "decoder": decoder_error(self.decode, mean, transform, self.factor),
            "psnr_db": moved_psnr(encode, self.decode, image, transform, self.factor),
        }


def _per_sample(value: Tensor | tuple[Tensor, Tensor], image: Tensor) -> Tensor:
    """Narrow torchmetrics' result, whose type allows for maps that are not asked for here."""
    assert isinstance(value, Tensor)
    return value.reshape(len(image))
