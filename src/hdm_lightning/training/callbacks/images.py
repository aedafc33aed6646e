"""Images during training: samples of fixed prompts with averaged weights, and an autoencoder's reconstructions."""

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
    """Generates images of prompts at several aspect ratios, as PNG and to the loggers, with the first weight average.

    Needs a `FlowModule` whose network is an XUT; does nothing for other networks. Uses the text encoder's tokenizer.

    Args:
        prompts: prompts to generate images of; none disables it.
        resolution: images have about resolution² pixels.
        folder: folder of the PNGs; None for `samples` next to the first logger's files.
        every_n_steps: optimizer steps between two sets of images; 0 disables generation by steps.
        every_minutes: minutes after which images are generated if no such step has come; 0 disables generation by
            time. Images are always generated at the end.
        aspect_ratios: width / height of the images.
        steps: solver steps.
        guidance_scale: scale of classifier-free guidance.
        shift: shift of the solver's time grid; above 1 takes more steps near noise.
        seed: noise seed of the first image.
        context_length: caption tokens to keep.
        samples_before: samples of earlier trainings, which are added to the count in file names.
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
        self.prompts, self.resolution, self.every_n_steps = list(prompts), resolution, every_n_steps
        self.folder = folder
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
        """Generate images if due."""
        if due(step, self.every_n_steps, last_step(trainer)) or self._clock.has_run_out(trainer, step):
            self._draw_once(trainer, module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate images at the end, whatever ended the fit."""
        if trainer.global_step:
            self._draw_once(trainer, pl_module)

    def _draw_once(self, trainer: Trainer, module: LightningModule) -> None:
        """Generate on the first process while the others wait, or on all if the network is sharded."""
        if not self.prompts or self._drawn_at == trainer.global_step or not isinstance(module.network, XUT):
            return
        self._drawn_at = trainer.global_step
        if trainer.is_global_zero or is_sharded(module.network):
            self.draw(trainer, module)
        self._clock.restart()
        barrier()

    def draw(self, trainer: Trainer, module: Any) -> None:
        """Generate images now."""
        seen = self.samples_before + int(module.samples_trained)
        pipeline = self._pipeline(trainer, module)
        folder = samples_folder(trainer, self.folder)
        for ratio in self.aspect_ratios:
            height, width = size_of(ratio, self.resolution, pipeline.size_multiple)
            settings = SamplingSettings(height=height, width=width, **self.solver)  # type: ignore[arg-type]
            seeds = [self.seed + number for number in range(len(self.prompts))]
            try:
                with torch.no_grad(), trainer.precision_plugin.val_step_context(), uncompiled():
                    images = pipeline.draw(self.prompts, seeds, settings)
            except UserError as error:  # early weights may give invalid images, which must not end a training
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


def samples_folder(trainer: Trainer, given: Path | str | None) -> Path:
    """Create the given folder, or `samples` in the folder of the trainer's first logger, and return it."""
    folder = Path(trainer.log_dir or trainer.default_root_dir, "samples") if given is None else Path(given)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def log_image(trainer: Trainer, tag: str, image: Image.Image, step: int) -> None:
    """Send an image to every logger that accepts one (TensorBoard, MLflow, and those with a `log_image`)."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, np.asarray(image), step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, np.asarray(image), key=tag, step=step)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[image], step=step)


def size_of(aspect_ratio: float, resolution: int, multiple: int) -> tuple[int, int]:
    """Return (height, width), multiples of `multiple`, for about resolution² pixels and a ratio of width to height."""
    height = max(1, round(resolution / math.sqrt(aspect_ratio) / multiple)) * multiple
    width = max(1, round(resolution * math.sqrt(aspect_ratio) / multiple)) * multiple
    return height, width


class ReconstructionImages(Callback):
    """Reconstructs the first validation images in every validation, as PNG and to the loggers, on the first process.

    Put it after a `WeightAverages`, which replaces the weights with its first average for a validation.

    Args:
        count: number of images; 0 disables it.
        folder: folder of the PNGs; None for `samples` next to the first logger's files.
    """

    def __init__(self, count: int = 6, folder: Path | str | None = None) -> None:
        self.count = count
        self.folder = folder
        self._images: list[Tensor] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset."""
        self._images = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *place: Any) -> None:
        """Collect images until there are enough."""
        if trainer.is_global_zero and sum(map(len, self._images)) < self.count:
            self._images.append(batch["image"][batch["weight"] > 0])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reconstruct and log them."""
        images = torch.cat(self._images)[: self.count] if self._images else torch.zeros(0)
        if not len(images) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module.network, AutoencoderNetwork)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            drawn = _sheet(pl_module.network, signed(images))
        seen, folder = int(getattr(pl_module, "samples_trained", 0)), samples_folder(trainer, self.folder)
        drawn_sheet = Image.fromarray((drawn * 255).round().byte().movedim(0, -1).cpu().numpy())
        write_atomically(folder / f"{seen:012d}.png", partial(drawn_sheet.save, format="PNG"))
        log_image(trainer, "autoencoder", drawn_sheet, seen)


def _sheet(network: AutoencoderNetwork, images: Tensor) -> Tensor:
    halves = exact_scales(images.shape[-1] // network.factor, (1,), 2)
    transforms: list[Transform] = [QuarterTurn(1), *(Scale.uniform(half) for half in halves)]
    return sheet(lambda image: network.posterior(image).mean, network.decode, images, transforms, network.factor)
