"""Watches the loss and the weights; when they go wrong, every process leaves the fit together to rewind.

B samples of a micro-batch on this process.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hdm_lightning.training.callbacks.spike_detector import Finding, SpikeDetector
from hdm_lightning.training.callbacks.steps import StepWatcher, due, last_step
from hdm_lightning.training.flow_module import FlowMatchingModule
from hdm_lightning.training.processes import gathered, summed
from hdm_lightning.training.strategies.sharded_tensors import local_parts

GUARD_KEY = "GuardLoss"
KEYS_KEPT = 500_000
SUSPECTS = 8


@dataclass(frozen=True)
class TrainedSamples:
    """What a process remembers of a micro-batch: its step, and each sample's position, key and loss (B,)."""

    step: int
    positions: Tensor
    keys: list[str]
    losses: Tensor


class LossRewind(Exception):
    """The training has gone wrong at a step; the same on every process.

    Attributes:
        finding: step and reason.
        samples: (position, key) of the samples trained on since the last good checkpoint, on all processes.
        suspects: keys of the samples whose loss was not finite, or highest, at the step.
    """

    def __init__(self, finding: Finding, samples: list[tuple[int, str]], suspects: list[str]) -> None:
        super().__init__(finding.reason)
        self.finding = finding
        self.samples = samples
        self.suspects = suspects


class GuardLoss(StepWatcher, Callback):
    """Raises `LossRewind` on every process when the loss spikes or loss or weights are not finite.

    It stands before all callbacks that use the weights. On CUDA the device is waited for every `look_every` steps
    only, and at the steps at which something uses the weights; the finding names the true step all the same.

    Args:
        detector: the rule.
        cadences: every how many steps something uses the weights (see `steps.due`).
        look_every: steps between two looks on CUDA; elsewhere every step is looked at.
    """

    def __init__(self, detector: SpikeDetector, cadences: Sequence[int], look_every: int = 10) -> None:
        super().__init__()
        self.detector = detector
        self.cadences = tuple(cadences)
        self.look_every = look_every
        self._sums: list[tuple[int, Tensor]] = []
        self._step_sum: Tensor | None = None
        self._pending: list[TrainedSamples] = []
        self._seen: list[tuple[int, str]] = []

    @property
    def state_key(self) -> str:
        """A fixed name in the checkpoint, read by `training.recovery.rewinds`."""
        return GUARD_KEY

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the micro-batch to the step's loss, on the device."""
        assert isinstance(pl_module, FlowMatchingModule) and pl_module.sample_losses is not None
        losses, weight = pl_module.sample_losses.float(), batch["weight"]
        both = torch.stack([(losses * weight).sum(), weight.sum()])
        self._step_sum = both if self._step_sum is None else self._step_sum + both
        step = trainer.global_step + int(trainer.global_step == self._last_step)
        self._pending.append(TrainedSamples(step, batch["index"], batch["keys"], losses))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Close the step's sum and look where the weights are about to be used."""
        assert self._step_sum is not None
        self._sums.append((step, self._step_sum))
        self._step_sum = None
        used = any(due(step, every, last_step(trainer)) for every in self.cadences)
        if used or module.device.type != "cuda" or step % self.look_every == 0:
            self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        """Examine the steps since the last look; every process calls this together.

        Raises:
            LossRewind: on every process alike.
        """
        if not self._sums:
            return
        finding = self._examine(trainer.lightning_module)
        if finding is not None:
            worst = heapq.merge(*gathered(self._suspects(finding.step)), reverse=True)
            self._remember()
            samples = heapq.merge(*map(sorted, gathered(self._seen)))
            raise LossRewind(finding, list(samples), [key for _, key in worst][:SUSPECTS])
        self._remember()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What came before a checkpoint that was written while all was well will not be skipped."""
        if self.detector.streak == 0:
            self._seen = []

    def _examine(self, module: LightningModule) -> Finding | None:
        steps = [step for step, _ in self._sums]
        broken = torch.zeros_like(self._sums[0][1])
        broken[0] = ~weights_are_finite(module)
        rows = torch.stack([*(sums for _, sums in self._sums), broken])
        *sums, (broken_on, _) = summed(rows).tolist()
        self._sums = []
        for step, (total, count) in zip(steps, sums, strict=True):
            finding = self.detector.observe(step, total / count) if count else None
            if finding is not None:
                return finding
        if broken_on:
            self.detector.streak += 1
            return Finding(steps[-1], f"weights are not finite after step {steps[-1]}")
        return None

    def _suspects(self, step: int) -> list[tuple[float, str]]:
        """The highest losses of this process at the step, infinity for those that are not finite."""
        scored = [
            (loss if loss - loss == 0 else float("inf"), key)
            for samples in self._pending
            if samples.step == step
            for loss, key in zip(samples.losses.tolist(), samples.keys, strict=True)
        ]
        worst = sorted(scored, reverse=True)[:SUSPECTS]
        unfinite = [entry for entry in worst if entry[0] == float("inf")]
        return unfinite or worst

    def _remember(self) -> None:
        for samples in self._pending:
            self._seen.extend(zip(samples.positions.tolist(), samples.keys, strict=True))
        self._pending = []
        del self._seen[:-KEYS_KEPT]

    def state_dict(self) -> dict[str, Any]:
        """The detector, for the checkpoint."""
        return self.detector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The detector, from the checkpoint."""
        self.detector.load_state_dict(state_dict)


@torch.no_grad()
def weights_are_finite(module: LightningModule) -> Tensor:
    """Whether all trained weights of this process are finite, as a boolean () on their device, not waited for."""
    weights = local_parts(weight.detach() for weight in module.parameters() if weight.requires_grad)
    return torch.stack(torch._foreach_norm(weights)).isfinite().all()
