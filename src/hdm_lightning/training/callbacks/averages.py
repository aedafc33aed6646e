"""Keeps the weight averages up to date and inside the training checkpoint."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hdm_lightning.training.averaging.averages import ParameterAverages
from hdm_lightning.training.callbacks.steps import StepWatcher
from hdm_lightning.training.handover import AVERAGES_KEY


class AverageWeights(StepWatcher, Callback):
    """Updates `averages` once per optimizer step and saves them with the checkpoint."""

    def __init__(self, averages: ParameterAverages, samples_per_step: int) -> None:
        super().__init__()
        self.averages = averages
        self.samples_per_step = samples_per_step

    @property
    def state_key(self) -> str:
        """A fixed name in the checkpoint, read by `training.handover`."""
        return AVERAGES_KEY

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Move the averages towards the new weights."""
        self.averages.update(self.samples_per_step)

    def state_dict(self) -> dict[str, Any]:
        """The averages, for the checkpoint."""
        return self.averages.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The averages, from the checkpoint."""
        self.averages.load_state_dict(state_dict)
