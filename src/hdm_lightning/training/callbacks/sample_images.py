"""Images of fixed prompts while training goes on, drawn with the averaged weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.encoders.tokenizer import CaptionTokenizer
from hdm_lightning.generation.contact_sheet import contact_sheet
from hdm_lightning.generation.pipeline import TextToImage
from hdm_lightning.generation.png import to_pil
from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.training.callbacks.image_logging import default_folder, log_image
from hdm_lightning.training.callbacks.steps import StepWatcher, due, last_step
from hdm_lightning.training.callbacks.weight_averages import WeightAverages
from hdm_lightning.training.strategies.parallelize import uncompiled
from hdm_lightning.training.strategies.processes import barrier
from hdm_lightning.training.strategies.sharded_tensors import is_sharded


class SampleImages(StepWatcher, Callback):
    """Draws prompts at several aspect ratios, as PNG and to the loggers, with the first of the `WeightAverages`.

    For a `FlowModule` whose network is an XUT. The text encoder's own tokenizer is used.

    Args:
        prompts: what is drawn; none draws nothing.
        resolution: images have about resolution² pixels.
        folder: where the PNGs go; None for `samples` beside the first logger's files.
        every_n_steps: optimizer steps between two times; 0 means the end only.
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

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Draw where due; the first process draws, the others wait, or draw along where the network is split."""
        if not self.prompts or not due(step, self.every_n_steps, last_step(trainer)):
            return
        if trainer.is_global_zero or is_sharded(module.network):  # type: ignore[arg-type]
            self.draw(trainer, module)
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
            with torch.no_grad(), trainer.precision_plugin.val_step_context(), uncompiled():
                images = pipeline(self.prompts, seeds, settings)
            if trainer.is_global_zero:
                sheet = contact_sheet([to_pil(image) for image in images], self.prompts)
                sheet.save(folder / f"{seen:012d}-{width}x{height}.png")
                log_image(trainer, f"samples/{width}x{height}", sheet, seen)

    def _pipeline(self, trainer: Trainer, module: Any) -> TextToImage:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averages = next((each for each in callbacks if isinstance(each, WeightAverages)), None)
        averaged = averages is not None and averages.state is not None and averages.state.shadows
        network: Any = averages.bound(0) if averages is not None and averaged else module.network
        tokenizer = module.text_encoder.tokenizer
        bound: CaptionTokenizer = tokenizer.bind(self.context_length)
        return TextToImage(network, module.text_encoder, bound, module.autoencoder)


def size_of(aspect_ratio: float, resolution: int, multiple: int) -> tuple[int, int]:
    """Height and width of about resolution² pixels with the aspect ratio (width / height), in multiples."""
    height = max(1, round(resolution / math.sqrt(aspect_ratio) / multiple)) * multiple
    width = max(1, round(resolution * math.sqrt(aspect_ratio) / multiple)) * multiple
    return height, width
