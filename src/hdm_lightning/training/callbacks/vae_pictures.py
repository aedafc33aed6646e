"""Pictures of an autoencoder in training: reconstructions, moved latents decoded, latents as colours."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from hdm_lightning.autoencoding.transforms import QuarterTurn, Scale, Transform, exact_scales
from hdm_lightning.evaluation.autoencoder_pictures import sheet
from hdm_lightning.training.averaging.averages import WeightAverages
from hdm_lightning.training.callbacks.steps import StepWatcher, due
from hdm_lightning.training.callbacks.vae_validation import averaged
from hdm_lightning.training.processes import barrier
from hdm_lightning.training.vae.module import AutoencoderModule, signed
from hdm_lightning.whole_files import write_atomically


class DrawReconstructions(StepWatcher, Callback):
    """Draws the first validation images with the averaged weights, into TensorBoard and as PNG.

    Args:
        data: its `val_dataloader` yields the images.
        averages: the first average is drawn with; the raw weights where there is none.
        folder: where the PNGs go.
        every: optimizer steps between two times; 0 means start and end only.
        count: images; 0 draws nothing.
    """

    def __init__(
        self, data: LightningDataModule, averages: WeightAverages, folder: Path, every: int, count: int
    ) -> None:
        super().__init__()
        self.data = data
        self.averages = averages
        self.folder = folder
        self.every = every
        self.count = count

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before training, unless it is being resumed."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self.draw(trainer, pl_module)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Draw where due."""
        if due(step, self.every, trainer.max_steps):
            self.draw(trainer, module)

    def draw(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw now; the first process draws its own images, the others wait."""
        assert isinstance(module, AutoencoderModule)
        if self.count and trainer.is_global_zero:
            with trainer.precision_plugin.val_step_context():
                drawn = self._sheet(trainer, module)
            seen = trainer.global_step * module.plan.settings.batch_size
            self.folder.mkdir(parents=True, exist_ok=True)
            levels = (drawn * 255).round().byte().movedim(0, -1).cpu().numpy()
            picture = Image.fromarray(levels)
            write_atomically(self.folder / f"{seen:012d}.png", lambda file: picture.save(file, "PNG"))
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image("autoencoder", drawn, seen)
        barrier()

    def _sheet(self, trainer: Trainer, module: AutoencoderModule) -> Tensor:
        network, images = averaged(module.network, self.averages), []
        for batch in self.data.val_dataloader():
            images.append(batch["image"][batch["weight"] > 0])
            if sum(map(len, images)) >= self.count:
                break
        chosen = signed(torch.cat(images)[: self.count]).to(module.device)
        halves = exact_scales(chosen.shape[-1] // network.factor, (1,), 2)
        transforms: list[Transform] = [QuarterTurn(1), *(Scale.uniform(half) for half in halves)]
        return sheet(lambda image: network.posterior(image).mean, network.decode, chosen, transforms, network.factor)
