"""Watches the loss and the weights; when they go wrong, every process leaves the fit together.

B samples of a micro-batch on this process.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hdm_lightning.training.callbacks.steps import StepWatcher, rename_state
from hdm_lightning.training.strategies.processes import gathered, summed
from hdm_lightning.training.strategies.sharded_tensors import local_parts


@dataclass(frozen=True)
class Finding:
    """A step at which the training counts as diverged.

    Attributes:
        step: the optimizer step.
        reason: what was seen, for people.
    """

    step: int
    reason: str


class SpikeDetector:
    """A loss that is not finite, or one far above its running mean for several steps in a row.

    The running mean is exponential, of the steps that were not themselves far above it; a single high step is
    noise and passes.

    Args:
        factor: a step is high when its loss exceeds so many running means; None: only non-finite losses count.
        patience: high steps in a row that make a spike.
        warmup: steps whose losses only go into the running mean.
        memory: steps over which the running mean reaches back.
    """

    def __init__(self, factor: float | None, patience: int = 3, warmup: int = 100, memory: int = 100) -> None:
        self.factor = factor
        self.patience = patience
        self.warmup = max(1, warmup)
        self.memory = memory
        self.mean = 0.0
        self.steps = 0
        self.streak = 0

    def observe(self, step: int, loss: float) -> Finding | None:
        """Take in the loss of one optimizer step; returns the finding where this step completes one."""
        if not math.isfinite(loss):
            self.streak += 1
            return Finding(step, f"the loss of step {step} is not finite")
        if self.factor is not None and self.steps >= self.warmup and loss > self.factor * self.mean:
            self.streak += 1
            if self.streak >= self.patience:
                return Finding(
                    step,
                    f"the loss was above {self.factor:g} times its running mean {self.mean:.4g} for {self.streak} "
                    f"steps up to step {step} ({loss:.4g})",
                )
            return None
        self.streak = 0
        self.steps += 1
        self.mean += (loss - self.mean) / min(self.steps, self.memory)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"mean": self.mean, "steps": self.steps, "streak": self.streak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved values."""
        self.mean, self.steps, self.streak = float(state["mean"]), int(state["steps"]), int(state["streak"])


KEY, OLD_KEY = "LossGuard", "GuardLoss"
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
    """The training has diverged at a step; the same on every process.

    Attributes:
        finding: step and reason.
        samples: (position, key) of the samples trained on since the last good checkpoint, on all processes.
        suspects: keys of the samples whose loss was not finite, or highest, at the step.
    """

    def __init__(self, finding: Finding, samples: list[tuple[int, str]], suspects: list[str]) -> None:
        super().__init__(f"{finding.reason}; suspect samples: {', '.join(suspects) or 'none'}")
        self.finding = finding
        self.samples = samples
        self.suspects = suspects


class LossGuard(StepWatcher, Callback):
    """Raises `LossRewind` on every process when the loss spikes, or loss or weights are not finite.

    No checkpoint is written, by whatever callback, and no validation begins before the steps up to it were looked at.
    On CUDA the device is waited for every `look_every` steps only, and then; a finding names the true step anyway.
    Reads `sample_losses` of the training step's output (else `loss`) and the batch's `weight`, `keys` and `index`,
    where it has them. Put it before callbacks that use the weights.

    Args:
        spike_factor: a step's loss is high above so many running means; None: only what is not finite counts.
        patience: high steps in a row that make a spike.
        warmup_steps: steps of a fit before high losses count.
        look_every: steps between two looks on CUDA; elsewhere every step is looked at.
    """

    def __init__(
        self,
        spike_factor: float | None = 3.0,
        patience: int = 3,
        warmup_steps: int = 100,
        look_every: int = 10,
    ) -> None:
        super().__init__()
        self.detector = SpikeDetector(spike_factor, patience, warmup_steps)
        self.look_every = look_every
        self._sums: list[tuple[int, Tensor]] = []
        self._step_sum: Tensor | None = None
        self._pending: list[TrainedSamples] = []
        self._seen: list[tuple[int, str]] = []

    @property
    def state_key(self) -> str:
        """A fixed name in the checkpoint."""
        return KEY

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the micro-batch to the step's loss, on the device."""
        losses, weight = _weighted_losses(outputs, batch, pl_module.device)
        both = torch.stack([(losses * weight).sum(), weight.sum()])
        self._step_sum = both if self._step_sum is None else self._step_sum + both
        step = trainer.global_step + int(trainer.global_step == self._last_step)
        if isinstance(batch, Mapping) and "keys" in batch and "index" in batch:
            losses = losses.expand(len(batch["keys"]))
            self._pending.append(TrainedSamples(step, batch["index"], list(batch["keys"]), losses))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Close the step's sum, and look where it is time."""
        assert self._step_sum is not None
        self._sums.append((step, self._step_sum))
        self._step_sum = None
        if module.device.type != "cuda" or step % self.look_every == 0:
            self.look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before weights are measured."""
        self.look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look before weights are saved; what came before a checkpoint that was good will not be skipped."""
        self.look(trainer)
        checkpoint["callbacks"][KEY] = self.state_dict()  # as it is after the look
        if self.detector.streak == 0:
            self._seen = []

    def look(self, trainer: Trainer) -> None:
        """Examine the steps since the last look; every process calls this together.

        Raises:
            LossRewind: on every process alike.
        """
        if not self._sums:
            return
        finding = self._examine(trainer.lightning_module)
        suspects = gathered(self._suspects(finding.step)) if finding is not None else []
        self._remember()
        if finding is not None:
            worst = list(heapq.merge(*suspects, reverse=True))
            unfinite = [entry for entry in worst if entry[0] == float("inf")]
            samples = heapq.merge(*map(sorted, gathered(self._seen)))
            raise LossRewind(finding, list(samples), [key for _, key in unfinite or worst][:SUSPECTS])

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
        return sorted(scored, reverse=True)[:SUSPECTS]

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

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find the detector of an older version's checkpoint."""
        rename_state(checkpoint, OLD_KEY, KEY)


def guard_streak(checkpoint: Mapping[str, Any]) -> int:
    """High steps in a row that the guard had seen when a checkpoint was written; 0 without a guard."""
    states = checkpoint.get("callbacks", {})
    return int((states.get(KEY) or states.get(OLD_KEY) or {}).get("streak", 0))


@torch.no_grad()
def weights_are_finite(module: LightningModule) -> Tensor:
    """Whether all trained weights of this process are finite, as a boolean () on their device, not waited for."""
    weights = local_parts(weight.detach() for weight in module.parameters() if weight.requires_grad)
    return torch.stack(torch._foreach_norm(weights)).isfinite().all()


def _weighted_losses(outputs: Any, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Losses and weights (B,) of a micro-batch, or its mean loss (1,) with weight 1; weight 0 where there is none."""
    if isinstance(outputs, Mapping) and "sample_losses" in outputs:
        losses: Tensor = outputs["sample_losses"].detach().float()
        weight = batch.get("weight") if isinstance(batch, Mapping) else None
        return losses, torch.ones_like(losses) if weight is None else weight
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if loss is None:
        return torch.zeros(1, device=device), torch.zeros(1, device=device)
    mean = loss.detach().float().reshape(1)
    return mean, torch.ones_like(mean)
