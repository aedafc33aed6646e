"""Images during training: of fixed prompts with the averaged weights, of an autoencoder's reconstructions."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from PIL import Image
from torch import Tensor

from hdm_lightning.autoencoding.transforms import QuarterTurn, Scale, Transform, exact_scales
from hdm_lightning.errors import UserError
from hdm_lightning.generation.contact_sheet import contact_sheet
from hdm_lightning.generation.image_files import to_pil
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.metrics.latents import sheet
from hdm_lightning.models import XUT
from hdm_lightning.models.compiled_blocks import uncompiled
from hdm_lightning.training.callbacks.steps import SharedClock, StepWatcher, due, find_callback, last_step
from hdm_lightning.training.callbacks.weight_averages import WeightAverages
from hdm_lightning.training.modules.autoencoder_module import signed
from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork
from hdm_lightning.training.run_log import say
from hdm_lightning.training.strategies.processes import barrier
from hdm_lightning.training.strategies.sharded_tensors import is_sharded
from hdm_lightning.whole_files import write_atomically


class SampleImages(StepWatcher, Callback):
    """Draws prompts at several aspect ratios, as PNG and to the loggers, with the first of the `WeightAverages`.

    Of a `FlowModule` whose network is an XUT; another network draws nothing. The text encoder's own tokenizer is used.

    Args:
        prompts: what is drawn; none draws nothing.
        resolution: images have about resolution² pixels.
        folder: where the PNGs go; None for `samples` beside the first logger's files.
        every_n_steps: optimizer steps between two times; 0 for none by steps.
        every_minutes: minutes after which they are drawn where no such step has come round; 0 for none by time. The
            end is drawn in any case.
        aspect_ratios: width / height of the images.
        steps: solver steps.
        guidance_scale: classifier-free guidance.
        shift: of the solver's time grid; above 1 takes more steps near noise.
        seed: noise of the first image.
        context_length: caption tokens kept.
        samples_before: samples of the trainings before this one, which the files' names count too.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        resolution: int,
        folder: Path | str | None = None,
        every_n_steps: int = 0,
        every_minutes: float = 0.0,
        aspect_ratios: Sequence[float] = (1.0, 1.5, 0.6667),
        steps: int = 24,
        guidance_scale: float = 4.0,
        shift: float = 1.0,
        seed: int = 0,
        context_length: int = 256,
        samples_before: int = 0,
    ) -> None:
        super().__init__()
        self.prompts, self.resolution, self.every_n_steps = list(prompts), resolution, every_n_steps
        self.folder = None if folder is None else Path(folder)
        self.aspect_ratios, self.seed, self.context_length = tuple(aspect_ratios), seed, context_length
        self.solver = {"steps": steps, "guidance_scale": guidance_scale, "shift": shift}
        self.samples_before = samples_before
        self._drawn_at = -1
        self._clock = SharedClock(every_minutes)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._clock.begin(trainer.global_step)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Draw where due."""
        if due(step, self.every_n_steps, last_step(trainer)) or self._clock.has_run_out(trainer, step):
            self._draw_once(trainer, module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the end, whatever ended the fit."""
        if trainer.global_step:
            self._draw_once(trainer, pl_module)

    def _draw_once(self, trainer: Trainer, module: LightningModule) -> None:
        """The first process draws, the others wait, or draw along where the network is split."""
        if not self.prompts or self._drawn_at == trainer.global_step or not isinstance(module.network, XUT):
            return
        self._drawn_at = trainer.global_step
        if trainer.is_global_zero or is_sharded(module.network):
            self.draw(trainer, module)
        self._clock.restart()
        barrier()

    def draw(self, trainer: Trainer, module: Any) -> None:
        """Draw now."""
        seen = self.samples_before + int(module.samples_trained)
        pipeline = self._pipeline(trainer, module)
        folder = default_folder(trainer, self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for ratio in self.aspect_ratios:
            height, width = size_of(ratio, self.resolution, pipeline.size_multiple)
            settings = SamplingSettings(height=height, width=width, **self.solver)  # type: ignore[arg-type]
            seeds = [self.seed + number for number in range(len(self.prompts))]
            try:
                with torch.no_grad(), trainer.precision_plugin.val_step_context(), uncompiled():
                    images = pipeline.draw(self.prompts, seeds, settings)
            except UserError as error:  # early weights may draw what is no image; that ends no training
                say(f"no images of {width}x{height} at {seen} samples: {error.what}")
                continue
            if trainer.is_global_zero:
                sheet = contact_sheet([to_pil(image) for image in images], self.prompts)
                path = folder / f"{seen:012d}-{width}x{height}.png"
                write_atomically(path, partial(sheet.save, format="PNG"))
                log_image(trainer, f"samples/{width}x{height}", sheet, seen)

    def _pipeline(self, trainer: Trainer, module: Any) -> HDMPipeline:
        averages = find_callback(trainer, WeightAverages)
        averaged = averages is not None and averages.state is not None and averages.state.shadows
        network: Any = averages.bound(0) if averages is not None and averaged else module.network
        autoencoder, encoder = module.autoencoder, module.text_encoder
        return HDMPipeline(network, autoencoder, text_encoder=encoder, context_length=self.context_length)


def default_folder(trainer: Trainer, folder: Path | None) -> Path:
    """The folder as given, or `samples` where the trainer's first logger writes."""
    return folder or Path(trainer.log_dir or trainer.default_root_dir) / "samples"


def log_image(trainer: Trainer, tag: str, image: Image.Image, step: int) -> None:
    """Give an image to every logger that takes one (TensorBoard, MLflow, and those with a `log_image`)."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, np.asarray(image), step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, np.asarray(image), key=tag, step=step)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[image], step=step)


def size_of(aspect_ratio: float, resolution: int, multiple: int) -> tuple[int, int]:
    """Height and width of about resolution² pixels with the aspect ratio (width / height), in multiples."""
    height = max(1, round(resolution / math.sqrt(aspect_ratio) / multiple)) * multiple
    width = max(1, round(resolution * math.sqrt(aspect_ratio) / multiple)) * multiple
    return height, width


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

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *place: Any) -> None:
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
        drawn_sheet = Image.fromarray((drawn * 255).round().byte().movedim(0, -1).cpu().numpy())
        write_atomically(folder / f"{seen:012d}.png", partial(drawn_sheet.save, format="PNG"))
        log_image(trainer, "autoencoder", drawn_sheet, seen)


def _sheet(network: AutoencoderNetwork, images: Tensor) -> Tensor:
    halves = exact_scales(images.shape[-1] // network.factor, (1,), 2)
    transforms: list[Transform] = [QuarterTurn(1), *(Scale.uniform(half) for half in halves)]
    return sheet(lambda image: network.posterior(image).mean, network.decode, images, transforms, network.factor)
