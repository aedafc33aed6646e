"""How good an autoencoder is over a set of images, added up batch by batch: reconstruction, equivariance, latents.

Shapes: image (B,3,H,W) in [-1, 1]; latent (B,C,H/f,W/f); weight (B,), 0 for a masked sample.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hdm_lightning.metrics.equivariance import CentredError, Transform, relative_error
from hdm_lightning.metrics.image_quality import IMAGE_MEASURES, image_quality, psnr
from hdm_lightning.metrics.latents import LatentReport, LatentStatistics, radial_power

SPECTRUM_BINS = 8

Reduce = Callable[[Tensor], Tensor]


class AutoencoderMeasures:
    """Reconstruction, equivariance and latent statistics of one autoencoder.

    Args:
        posterior: image to the posterior's (mean, log-variance).
        decode: latent to image.
        channels: C.
        factor: f, pixels per latent cell.
        transforms: name (such as "scale") to the transforms that its equivariance errors are averaged over, by names of
            their own (such as "0.50"), under which the encoder's error of each stands too.
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
        # Rows: sums over images, and how many images each measure was taken on. The same shape whatever was measured,
        # so that a process without an image can take part in a sum over processes.
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64)
        self._power = torch.zeros(SPECTRUM_BINS, dtype=torch.float64)

    @torch.no_grad()
    def update(
        self, image: Tensor, weight: Tensor | None = None, *, cut: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Measure a batch; return the measures that each image has for itself, name to (B,) without masked samples.

        Args:
            image: sides that the factor divides, padded to them if need be.
            weight: 0 for a masked sample; None counts all.
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
        decoded = self.decode(mean)
        self.latents.update(mean, log_variance)
        self._power += radial_power(mean, SPECTRUM_BINS).cpu()
        values = self._reconstruction(_cut(decoded, cut), _cut(image, cut)) | self._equivariance(image, mean, decoded)
        for name, value in values.items():
            sum_and_count = torch.tensor([float(value.double().sum()), len(value)], dtype=torch.float64)
            self._sums[:, self._names.index(name)] += sum_and_count
        return values

    def report(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Return every measure's mean over the images, and those of the set as a whole.

        Args:
            reduce: adds a tensor up over processes, which all call this together.

        Raises:
            ValueError: no process has measured an image.
        """
        latents = self.latent_report(reduce)
        packed = torch.cat([self._sums.flatten(), self._power])
        total = packed if reduce is None else reduce(packed)
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
        """Return mean and standard deviation per channel and what follows from them."""
        return self.latents.report() if reduce is None else self.latents.report(reduce)

    def _all_names(self) -> list[str]:
        """Every measure that an image can have for itself."""
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
        """Errors of τ on both sides (arXiv 2502.09509, section 3), and the PSNR of D(τE(x)) against τx."""
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
