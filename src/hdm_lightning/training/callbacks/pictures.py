"""Pictures of fixed prompts while training goes on, drawn with the averaged weights."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from hdm_lightning.encoders.tokenizer import CaptionTokenizer
from hdm_lightning.generation.contact_sheet import contact_sheet
from hdm_lightning.generation.image_files import to_pil
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.training.apply import uncompiled
from hdm_lightning.training.averaging.averages import WeightAverages
from hdm_lightning.training.callbacks.scalars import samples_seen
from hdm_lightning.training.callbacks.steps import StepWatcher, due, last_step
from hdm_lightning.training.flow_module import FlowMatchingModule
from hdm_lightning.training.processes import barrier
from hdm_lightning.training.settings import SamplePictureSettings
from hdm_lightning.training.sharding import is_sharded
from hdm_lightning.whole_files import write_atomically


class DrawPictures(StepWatcher, Callback):
    """Draws the prompts at several aspect ratios, as PNG in the stage's folder and into TensorBoard.

    Args:
        settings: prompts, aspect ratios, solver steps, guidance.
        tokenizer: of the text encoder.
        averages: the first average draws.
        folder: where the PNGs go.
        every: optimizer steps between two times; 0 means the end only.
    """

    def __init__(
        self,
        settings: SamplePictureSettings,
        tokenizer: CaptionTokenizer,
        averages: WeightAverages,
        folder: Path,
        every: int,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.tokenizer = tokenizer
        self.averages = averages
        self.folder = folder
        self.every = every

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Draw where due; the first process draws, the others wait, or draw along where the network is split."""
        if not self.settings.prompts or not due(step, self.every, last_step(trainer)):
            return
        assert isinstance(module, FlowMatchingModule)
        if trainer.is_global_zero or is_sharded(module.network):
            self._draw(trainer, module)
        barrier()

    def _draw(self, trainer: Trainer, module: FlowMatchingModule) -> None:
        seen = samples_seen(trainer)
        pipeline = HDMPipeline(
            self.averages.bound(0) if self.averages.shadows else module.network,
            module.encoders.autoencoder,
            text_encoder=module.encoders.text,
            tokenizer=self.tokenizer.tokenizer,
            context_length=self.tokenizer.context_length,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        for ratio in self.settings.aspect_ratios:
            height, width = size_of(ratio, module.plan.settings.resolution, pipeline.size_multiple)
            with trainer.precision_plugin.val_step_context(), uncompiled():
                images = self._pictures(pipeline, height, width)
            if not trainer.is_global_zero:
                continue
            sheet = contact_sheet([to_pil(image) for image in images], self.settings.prompts)
            path = self.folder / f"{seen:012d}-{width}x{height}.png"
            write_atomically(path, partial(sheet.save, format="PNG"))
            self._log(trainer, np.asarray(sheet), f"samples/{width}x{height}", seen)

    def _pictures(self, pipeline: HDMPipeline, height: int, width: int) -> torch.Tensor:
        settings = SamplingSettings(
            height=height,
            width=width,
            steps=self.settings.steps,
            guidance_scale=self.settings.guidance_scale,
            shift=self.settings.shift,
        )
        seeds = [self.settings.seed + number for number in range(len(self.settings.prompts))]
        return pipeline.draw(self.settings.prompts, seeds, settings)

    def _log(self, trainer: Trainer, sheet: np.ndarray, tag: str, seen: int) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(tag, sheet, seen, dataformats="HWC")


def size_of(aspect_ratio: float, resolution: int, multiple: int) -> tuple[int, int]:
    """Height and width of about resolution² pixels with the aspect ratio (width / height), in multiples."""
    height = max(1, round(resolution / math.sqrt(aspect_ratio) / multiple)) * multiple
    width = max(1, round(resolution * math.sqrt(aspect_ratio) / multiple)) * multiple
    return height, width
