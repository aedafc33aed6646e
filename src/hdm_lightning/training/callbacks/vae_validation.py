"""Validation of an autoencoder on fixed images: all measures of `evaluation.autoencoder_measures`, averaged weights."""

import copy
from collections.abc import Callable

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from hdm_lightning.autoencoding.transforms import QuarterTurn, Scale, Transform, exact_scales
from hdm_lightning.metrics.autoencoder_quality import AutoencoderMeasures
from hdm_lightning.metrics.features import FeatureNetwork
from hdm_lightning.metrics.latents import LatentReport
from hdm_lightning.training.averaging.averages import ParameterAverages
from hdm_lightning.training.callbacks.steps import StepWatcher, due
from hdm_lightning.training.processes import summed
from hdm_lightning.training.vae.distances import ReconstructionDistances
from hdm_lightning.training.vae.module import AutoencoderModule, signed
from hdm_lightning.training.vae.network import AutoencoderNetwork
from hdm_lightning.training.vae.objective import PerceptualDistance


class ValidateAutoencoder(StepWatcher, Callback):
    """Measures the averaged weights at the start, every so many steps, and at the end.

    Args:
        data: its `val_dataloader` yields the images.
        averages: the first average is measured; the raw weights where there is none.
        every: optimizer steps between validations; 0 means start and end only.
        perceptual: distance to report, with its name, or None.
        features: network of the reconstructions' kernel and Fréchet distances, or None.
    """

    def __init__(
        self,
        data: LightningDataModule,
        averages: ParameterAverages,
        every: int,
        perceptual: tuple[str, PerceptualDistance] | None = None,
        features: FeatureNetwork | None = None,
    ) -> None:
        super().__init__()
        self.data = data
        self.averages = averages
        self.every = every
        self.perceptual = perceptual
        self.features = features
        self.measures: dict[str, float] = {}
        self.latents: LatentReport | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The measures before training, unless it is being resumed."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self.run(trainer, pl_module)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Validate where due."""
        if due(step, self.every, trainer.max_steps):
            self.run(trainer, module)

    @torch.no_grad()
    def run(self, trainer: Trainer, module: LightningModule) -> None:
        """Validate now and log; every process calls this together."""
        assert isinstance(module, AutoencoderModule)
        network = averaged(module.network, self.averages)
        measures = measures_of(network, module.plan.settings.resolution, self.perceptual)
        distances = None if self.features is None else ReconstructionDistances(self.features)
        for batch in self.data.val_dataloader():
            batch = trainer.strategy.batch_to_device(batch)
            image = signed(batch["image"])
            with trainer.precision_plugin.val_step_context():
                measures.update(image, batch["weight"])
                if distances is not None:
                    output = network.decode(network.posterior(image).mean)
                    distances.update(image, output, batch["index"], batch["weight"])
        self.measures = measures.report(reduce=_summed_on(module.device))
        self.measures |= {} if distances is None else distances.report()
        self.latents = measures.latent_report(_summed_on(module.device))
        moments = {"mean": self.latents.mean, "std": self.latents.std}
        channels = {f"latent/{name}_{c}": value for name, row in moments.items() for c, value in enumerate(row)}
        for logger in trainer.loggers:
            logger.log_metrics(self.measures | channels, step=trainer.global_step * module.plan.settings.batch_size)


def averaged(network: AutoencoderNetwork, averages: ParameterAverages) -> AutoencoderNetwork:
    """Return a frozen copy of the network with its first average, or with its own weights where there is none."""
    result = copy.deepcopy(network).eval().requires_grad_(False)
    if averages.shadows:
        result.load_state_dict(averages.weights(0))
    return result


def measures_of(
    network: AutoencoderNetwork, resolution: int, perceptual: tuple[str, PerceptualDistance] | None = None
) -> AutoencoderMeasures:
    """Return empty measures of a network: rotation by each quarter turn, scaling by 1/4, 1/2 and 3/4 where exact.

    Scaling is measured both ways, without antialias as EQ-VAE's experiment takes it, and with.
    """

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


def measured_transforms(cells: int) -> dict[str, dict[str, Transform]]:
    """Return each quarter turn by its degrees, and the scales 1/4, 1/2, 3/4 that are exact of so many cells."""
    scales = {f"{float(scale):.2f}": scale for scale in exact_scales(cells, (1, 2, 3), 4)}
    return {
        "rotation": {str(90 * turns): QuarterTurn(turns) for turns in (1, 2, 3)},
        "scale": {name: Scale.uniform(scale) for name, scale in scales.items()},
        "scale_antialiased": {name: Scale.uniform(scale, antialias=True) for name, scale in scales.items()},
    }


def _summed_on(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the sum over processes, by way of a device that the process group can reach."""
    return lambda values: summed(values.to(device)).cpu()
