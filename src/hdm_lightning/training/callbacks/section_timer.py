"""Seconds of the parts of a training step, from the actions that Lightning names to its profiler anyway."""

import re
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import Profiler

from hdm_lightning.training.callbacks.section_clock import SectionClock

DATA = "data"
SECTIONS = {
    r"\[_TrainingEpochLoop\]\.train_dataloader_next": DATA,
    r"\[\w+\]encode_images": "vae",
    r"\[\w+\]encode_text": "text",
    r"\[\w+\]network": "xut",
    r"\[\w+\]autoencoder": "autoencoder",
    r"\[Strategy\]\w+\.backward": "backward",
}
"""Names of actions, Lightning's and those of this project's modules, and the sections that they count as."""


class SectionTimer(Profiler):
    """Passes every action on to the trainer's own profiler, and adds up the seconds of those in `SECTIONS`.

    `attach` puts it in the profiler's place, `detach` puts that back. Only training counts.

    Args:
        device: on CUDA a section is two events on the stream, elsewhere the host's clock.
        on_fetch: called when the wait for a batch begins.
    """

    def __init__(self, device: torch.device, on_fetch: Callable[[], None]) -> None:
        super().__init__()
        self.clock = SectionClock()
        self.clock.device = device
        self.on_fetch = on_fetch
        self._inner: Any = None
        self._trainer: Any = None
        self._known: dict[str, str | None] = {}

    def attach(self, trainer: Trainer) -> None:
        """Take the place of the trainer's profiler."""
        self._trainer = trainer
        self._inner, self._trainer.profiler = self._trainer.profiler, self

    def detach(self) -> None:
        """Put the trainer's profiler back."""
        if self._trainer is not None:
            self._trainer.profiler = self._inner
            self._trainer = None

    def start(self, action_name: str) -> None:
        """Begin an action."""
        self._inner.start(action_name)
        section = self._section(action_name)
        if section is not None:
            if section == DATA:
                self.on_fetch()
            self.clock.start(section)

    def stop(self, action_name: str) -> None:
        """End an action."""
        section = self._section(action_name)
        if section is not None:
            self.clock.stop(section)
        self._inner.stop(action_name)

    def _section(self, action_name: str) -> str | None:
        if self._trainer is None or not self._trainer.training:
            return None
        if action_name not in self._known:
            found = (section for pattern, section in SECTIONS.items() if re.fullmatch(pattern, action_name))
            self._known[action_name] = next(found, None)
        return self._known[action_name]

    def summary(self) -> str:
        """That of the trainer's own profiler."""
        return str(self._inner.summary())

    def describe(self) -> None:
        """Let the trainer's own profiler describe."""
        self._inner.describe()

    def teardown(self, stage: str | None) -> None:
        """Let the trainer's own profiler end."""
        self._inner.teardown(stage)
