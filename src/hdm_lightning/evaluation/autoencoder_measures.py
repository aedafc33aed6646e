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
    CentredError,
    Transform,
    psnr,
    relative_error,
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
        self.transforms = {name: tuple(each) for name, each in transforms.items() if each}
        self.perceptual, self.perceptual_name = perceptual, perceptual_name
        self.latents = LatentStatistics(channels)
        self.centred = {name: CentredError(channels) for name in self.transforms}
        self._sums: dict[str, float] = {}
        self._weight = 0.0

    @torch.no_grad()
    def update(
        self, image: Tensor, weight: Tensor | None = None, *, cut: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Measure a batch; return the measures that each image has for itself, name to (B without holes,).

        Args:
            image: sides that the factor divides, padded to them if need be.
            weight: 0 for a hole; None counts all.
            cut: height and width of the images before padding, which reconstructions are compared on.

        Raises:
            ValueError: the factor does not divide the image's sides.
        """
        if any(side % self.factor for side in image.shape[-2:]):
            size = "×".join(map(str, image.shape[-2:]))
            raise ValueError(f"image: got {size} px, expected sides that the factor {self.factor} divides; pad or crop")
        if weight is not None:
            image = image[weight > 0]
        if not len(image):
            return {}
        mean, log_variance = self.posterior(image)
        self.latents.update(mean, log_variance)
        values = self._reconstruction(_cut(self.decode(mean), cut), _cut(image, cut)) | self._equivariance(image, mean)
        shared = {f"latent/spectrum_{ring}": share for ring, share in enumerate(radial_spectrum(mean, SPECTRUM_BINS))}
        for name, value in values.items():
            self._add(name, float(value.double().sum()))
        for name, value in shared.items():
            self._add(name, float(value) * len(image))
        self._weight += len(image)
        return values

    def report(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Return every measure's mean over the images, and those of the set as a whole.

        Args:
            reduce: adds a tensor up over processes, every one of which must have measured at least one image.
        """
        keys = sorted(self._sums)
        packed = torch.tensor([self._weight, *(self._sums[key] for key in keys)], dtype=torch.float64)
        total = packed if reduce is None else reduce(packed)
        report = {key: float(value / total[0]) for key, value in zip(keys, total[1:], strict=True)}
        for name, error in self.centred.items():
            report[f"equivariance/encoder_{name}_centred"] = error.report(reduce)
        latents = self.latent_report(reduce)
        report["latent/kl"] = latents.kl
        report["latent/dead_channels"] = float(latents.dead_channels)
        return report

    def latent_report(self, reduce: Reduce | None = None) -> LatentReport:
        """Return mean and standard deviation per channel and what follows from them."""
        return self.latents.report() if reduce is None else self.latents.report(reduce)

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

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
            measured = [self._one_transform(name, image, mean, transform) for transform in transforms]
            for key in measured[0]:
                values[f"equivariance/{key}_{name}"] = torch.stack([each[key] for each in measured]).mean(0)
        return values

    def _one_transform(self, name: str, image: Tensor, mean: Tensor, transform: Transform) -> dict[str, Tensor]:
        moved_image, moved_latent = transform(image, self.factor), transform(mean, 1)
        latent_of_moved = self.posterior(moved_image)[0]
        self.centred[name].update(moved_latent, latent_of_moved)
        decoded = self.decode(moved_latent)
        return {
            "encoder": relative_error(moved_latent, latent_of_moved),
            "decoder": relative_error(decoded, transform(self.decode(mean), self.factor)),
            "psnr_db": psnr(decoded, moved_image),
        }


def _cut(image: Tensor, size: tuple[int, int] | None) -> Tensor:
    return image if size is None else image[..., : size[0], : size[1]]


def _per_sample(value: Tensor | tuple[Tensor, Tensor], image: Tensor) -> Tensor:
    """Narrow torchmetrics' result, whose type allows for maps that are not asked for here."""
    assert isinstance(value, Tensor)
    return value.reshape(len(image))
