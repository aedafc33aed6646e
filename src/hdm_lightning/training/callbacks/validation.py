"""Validation on fixed samples with fixed noise and times, raw and averaged weights."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from hdm_lightning.diffusion.flow import logit_normal_times
from hdm_lightning.training.apply import uncompiled
from hdm_lightning.training.averaging.averages import WeightAverages
from hdm_lightning.training.callbacks.scalars import log
from hdm_lightning.training.callbacks.steps import StepWatcher, due, last_step
from hdm_lightning.training.flow_module import VALIDATION, FlowMatchingModule
from hdm_lightning.training.flow_step import Network
from hdm_lightning.training.processes import summed
from hdm_lightning.training.settings import ValidationSettings


class ValidateFlow(StepWatcher, Callback):
    """Logs the loss of the validation samples at the stage's start, every so many steps, and at its end.

    Samples, noise and times follow from the validation's own seed, nothing is routed or dropped, and every
    sample keeps its time in all validations, so that the values compare across stages and across runs of any seed.
    The network runs in eager mode, also where it is compiled: batches of another shape and mode than the training's
    would need graphs of their own, which take longer to make than all validations of a stage.

    Args:
        data: its `val_dataloader` yields the samples.
        averages: validated beside the raw weights.
        every: optimizer steps between validations; 0 means start and end only.
        settings: the seed of noise and times, and the number of samples over all processes that the times are
            stratified over.
    """

    def __init__(
        self, data: LightningDataModule, averages: WeightAverages, every: int, settings: ValidationSettings
    ) -> None:
        super().__init__()
        self.data = data
        self.averages = averages
        self.every = every
        self.settings = settings
        self.latest: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loss right after a hand-over, unless the stage is being resumed."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self.run(trainer, pl_module)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Validate where due."""
        if due(step, self.every, last_step(trainer)):
            self.run(trainer, module)

    @torch.no_grad()
    def run(self, trainer: Trainer, module: LightningModule) -> None:
        """Validate now and log; every process calls this together."""
        assert isinstance(module, FlowMatchingModule)
        networks: dict[str, Network] = {"raw": module.network}
        networks |= {name: self.averages.bound(which) for which, name in enumerate(self.averages.names())}
        totals = torch.zeros(len(networks), 2, device=module.device)
        with module.clock.paused(), uncompiled():
            for batch in self.data.val_dataloader():
                drawn = module.with_draws(batch, VALIDATION, self.settings.samples, self.settings.seed)
                batch = self._on_device(trainer, drawn)
                t = logit_normal_times(batch["uniform"])  # the same in every stage, whatever times it trains on
                with trainer.precision_plugin.val_step_context():
                    for row, network in enumerate(networks.values()):
                        loss = module.losses(batch, network, t)
                        totals[row, 0] += (loss * batch["weight"]).sum()
                        totals[row, 1] += batch["weight"].sum()
        sums = summed(totals).tolist()
        self.latest = {
            name: total / count if count else math.nan for name, (total, count) in zip(networks, sums, strict=True)
        }
        log(trainer, {f"loss/validation_{name}": value for name, value in self.latest.items()})

    def state_dict(self) -> dict[str, Any]:
        """The latest losses, for a stage that is killed between its last checkpoint and the note of its end."""
        return {"latest": dict(self.latest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the latest losses."""
        self.latest = dict(state_dict["latest"])

    def _on_device(self, trainer: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
        moved: dict[str, Any] = trainer.strategy.batch_to_device(batch)
        return moved
