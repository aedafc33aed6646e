"""Images of an autoencoder in training: reconstructions, moved latents decoded, latents as colours."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from hdm_lightning.autoencoding.transforms import QuarterTurn, Scale, Transform, exact_scales
from hdm_lightning.metrics.latents import sheet
from hdm_lightning.training.callbacks.sample_images import default_folder, log_image
from hdm_lightning.training.modules.autoencoder_module import signed
from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork
from hdm_lightning.whole_files import write_atomically


class ReconstructionImages(Callback):
    """Draws the first validation images in every validation, as PNG and to the loggers, on the first process.

    Put it after a `WeightAverages`, which puts its first average in place of the weights for a validation.

    Args:
        count: images; 0 draws nothing.
        folder: where the PNGs go; None for `samples` beside the first logger's files.
    """

    def __init__(self, count: int = 6, folder: Path | str | None = None) -> None:
        self.count = count
        self.folder = None if folder is None else Path(folder)
        self._images: list[Tensor] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin empty."""
        self._images = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep images until there are enough."""
        if trainer.is_global_zero and sum(map(len, self._images)) < self.count:
            self._images.append(batch["image"][batch["weight"] > 0])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them."""
        images = torch.cat(self._images)[: self.count] if self._images else torch.zeros(0)
        if not len(images) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module.network, AutoencoderNetwork)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            drawn = _sheet(pl_module.network, signed(images))
        seen, folder = int(getattr(pl_module, "samples_trained", 0)), default_folder(trainer, self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((drawn * 255).round().byte().movedim(0, -1).cpu().numpy())
        write_atomically(folder / f"{seen:012d}.png", partial(picture.save, format="PNG"))
        log_image(trainer, "autoencoder", picture, seen)


def _sheet(network: AutoencoderNetwork, images: Tensor) -> Tensor:
    halves = exact_scales(images.shape[-1] // network.factor, (1,), 2)
    transforms: list[Transform] = [QuarterTurn(1), *(Scale.uniform(half) for half in halves)]
    return sheet(lambda image: network.posterior(image).mean, network.decode, images, transforms, network.factor)
