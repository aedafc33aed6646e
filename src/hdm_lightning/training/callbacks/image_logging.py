"""Images of a training, as PNG in a folder and to the loggers that show images."""

from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image


def default_folder(trainer: Trainer, folder: Path | None) -> Path:
    """The folder as given, or `samples` where the trainer's first logger writes."""
    return folder or Path(trainer.log_dir or trainer.default_root_dir) / "samples"


def log_image(trainer: Trainer, tag: str, image: Image.Image, step: int) -> None:
    """Give an image to every logger that takes one (TensorBoard, and those with a `log_image`)."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, np.asarray(image), step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[image], step=step)
