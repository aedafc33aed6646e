"""All measures of an autoencoder on the validation images; `AutoencoderModule` itself logs only three of them.

Shapes: image and output (B,3,H,W) in [-1, 1]; index and weight (B,); features (N,D).
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hdm_lightning.autoencoding.transforms import measured_transforms
from hdm_lightning.generation.image_files import to_uint8
from hdm_lightning.metrics.autoencoder_quality import AutoencoderMeasures
from hdm_lightning.metrics.distances import FEWEST_SAMPLES, frechet_distance, frechet_needs, kernel_distance, moments
from hdm_lightning.metrics.features import FeatureNetwork, frechet_name, kernel_name
from hdm_lightning.metrics.latents import LatentReport
from hdm_lightning.training.callbacks.steps import log_now
from hdm_lightning.training.modules.adversarial import PerceptualDistance
from hdm_lightning.training.modules.autoencoder_module import signed
from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork
from hdm_lightning.training.strategies import processes
from hdm_lightning.training.strategies.processes import summed


class ReconstructionDistances:
    """Collects the features of images and their reconstructions.

    Args:
        network: the frozen feature network.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self._index: list[int] = []
        self._real, self._decoded = [torch.zeros(0, network.width)], [torch.zeros(0, network.width)]

    @torch.no_grad()
    def update(self, image: Tensor, output: Tensor, index: Tensor, weight: Tensor) -> None:
        """Add images and their reconstructions, except those of weight 0; `index` is their place in the order."""
        kept = weight > 0
        self._index += index[kept].tolist()
        if not kept.any():
            return
        with torch.autocast(image.device.type, enabled=False):
            self._real.append(self.network(to_uint8(image[kept])).cpu())
            self._decoded.append(self.network(to_uint8(output[kept])).cpu())

    def report(self) -> dict[str, float]:
        """Return the distances that there are enough images for; all processes must call this together.

        The kernel distance compares one half's reconstructions with the images of the other half, unbiased; the
        Fréchet distance compares all reconstructions with their own images and needs at least D + 1 images.
        """
        parts = processes.gathered((self._index, torch.cat(self._real), torch.cat(self._decoded)))
        order = torch.tensor([number for index, _, _ in parts for number in index]).argsort()
        real, decoded = (torch.cat([part[which] for part in parts])[order] for which in (1, 2))
        found: dict[str, float] = {}
        half = len(real) // 2
        if half >= FEWEST_SAMPLES:
            found[f"reconstruction/{kernel_name(self.network)}"] = kernel_distance(real[half:], decoded[:half])
        if len(real) >= frechet_needs(self.network.width):
            distance = frechet_distance(moments(real), moments(decoded))
            found[f"reconstruction/r{frechet_name(self.network)}"] = distance
        return found


class AutoencoderReport(Callback):
    """Measures reconstruction, equivariance and latents in every validation, with the weights that it runs on.

    Put it after a `WeightAverages`, which replaces the weights with its first average for a validation.

    Args:
        perceptual: perceptual distance to report, as (name, distance), or None.
        features: feature network for the reconstructions' kernel and Fréchet distances, or None.

    Attributes:
        measures: measures of the last validation, by name.
        latents: moments of the latents in the last validation, or None.
    """

    def __init__(
        self, perceptual: tuple[str, PerceptualDistance] | None = None, features: FeatureNetwork | None = None
    ) -> None:
        self.perceptual = perceptual
        self.features = features
        self.measures: dict[str, float] = {}
        self.latents: LatentReport | None = None
        self._measured: AutoencoderMeasures | None = None
        self._distances: ReconstructionDistances | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset."""
        self._measured = None
        self._distances = None if self.features is None else ReconstructionDistances(self.features)

    @torch.no_grad()
    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *place: Any) -> None:
        """Measure a batch."""
        network, image = pl_module.network, signed(batch["image"])
        assert isinstance(network, AutoencoderNetwork)
        if self._measured is None:
            self._measured = measures_of(network, image.shape[-1], self.perceptual)
        with trainer.precision_plugin.val_step_context():
            self._measured.update(image, batch["weight"])
            if self._distances is not None:
                output = network.decode(network.posterior(image).mean)
                self._distances.update(image, output, batch["index"], batch["weight"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum over processes, and log."""
        if self._measured is None:
            return
        reduce = _summed_on(pl_module.device)
        self.measures = self._measured.report(reduce=reduce)
        self.measures |= {} if self._distances is None else self._distances.report()
        self.latents = self._measured.latent_report(reduce)
        moments = {"mean": self.latents.mean, "std": self.latents.std}
        channels = {f"latent/{name}_{c}": value for name, row in moments.items() for c, value in enumerate(row)}
        log_now(trainer, self.measures | channels)

    def state_dict(self) -> dict[str, Any]:
        """Return the last validation's results, for a training that is killed before its end is recorded."""
        return {"measures": self.measures, "latents": None if self.latents is None else asdict(self.latents)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last validation's results."""
        self.measures = dict(state_dict["measures"])
        latents = state_dict["latents"]
        self.latents = None if latents is None else LatentReport(**latents)


def measures_of(
    network: AutoencoderNetwork, resolution: int, perceptual: tuple[str, PerceptualDistance] | None = None
) -> AutoencoderMeasures:
    """Create empty measures of a network: rotation by quarter turns, scaling by 1/4, 1/2 and 3/4 where exact."""

    def posterior(image: Tensor) -> tuple[Tensor, Tensor]:
        found = network.posterior(image)
        return found.mean, found.log_variance

    return AutoencoderMeasures(
        posterior,
        network.decode,
        channels=network.channels,
        factor=network.factor,
        transforms=measured_transforms(resolution // network.factor),
        perceptual=perceptual[1] if perceptual else None,
        perceptual_name=perceptual[0] if perceptual else "",
    )


def _summed_on(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function that sums over processes, via a device that the process group supports."""
    return lambda values: summed(values.to(device)).cpu()
