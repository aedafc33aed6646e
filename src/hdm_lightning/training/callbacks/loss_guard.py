"""Watch the loss and the weights, and leave the fit on all processes together when they diverge.

B: samples of a micro-batch on this process.
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
    """An optimizer step at which the training is considered diverged, and a human-readable reason."""

    step: int
    reason: str


class SpikeDetector:
    """Detects a loss that is not finite, or far above its running mean for several steps in a row.

    The running mean is exponential, over the steps that were not themselves far above it; a single high step counts
    as noise.

    Args:
        factor, patience, warmup: as of `LossGuard`; losses of the warm-up only update the running mean.
        memory: number of steps that the running mean averages over.
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
        """Process the loss of one optimizer step; return a finding if the training has diverged with it."""
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
        """Return plain values."""
        return {"mean": self.mean, "steps": self.steps, "streak": self.streak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore saved values."""
        self.mean, self.steps, self.streak = float(state["mean"]), int(state["steps"]), int(state["streak"])


KEY, OLD_KEY = "LossGuard", "GuardLoss"
KEYS_KEPT = 500_000
SUSPECTS = 8


@dataclass(frozen=True)
class TrainedSamples:
    """Record of a micro-batch on this process: its step, and each sample's position, key and loss (B,)."""

    step: int
    positions: Tensor
    keys: list[str]
    losses: Tensor


class LossRewind(Exception):
    """The training has diverged at a step; raised alike on every process.

    Attributes:
        finding: step and reason.
        samples: (position, key) of the samples trained on since the last good checkpoint, on all processes.
        suspects: keys of the samples whose loss at the step was not finite, or else highest.
    """

    def __init__(self, finding: Finding, samples: list[tuple[int, str]], suspects: list[str]) -> None:
        super().__init__(f"{finding.reason}; suspect samples: {', '.join(suspects) or 'none'}")
        self.finding = finding
        self.samples = samples
        self.suspects = suspects


class LossGuard(StepWatcher, Callback):
    """Raises `LossRewind` on every process when the loss spikes, or the loss or weights are not finite.

    All steps so far are checked before any callback writes a checkpoint and before every validation. In between, CUDA
    steps are checked only every `look_every` steps, since that waits for the device; a finding names the right step.
    Reads `sample_losses` of the training step's output (or else `loss`) and the batch's `weight`, `keys` and `index`,
    if present. Put it before callbacks that use the weights.

    Args:
        spike_factor: a loss is high above this multiple of its running mean; None: only non-finite losses count.
        patience: high steps in a row that make a spike.
        warmup_steps: first steps of a fit, in which high losses do not count.
        look_every: steps between two checks on CUDA; elsewhere every step is checked.
    """

    state_key = KEY

    def __init__(
        self,
        spike_factor: float | None = 3.0,
        patience: int = 3,
        warmup_steps: int = 100,
        look_every: int = 10,
    ) -> None:
        self.detector = SpikeDetector(spike_factor, patience, warmup_steps)
        self.look_every = look_every
        self._sums: list[tuple[int, Tensor]] = []
        self._step_sum: Tensor | None = None
        self._pending: list[TrainedSamples] = []
        self._seen: list[tuple[int, str]] = []

    def on_micro_batch(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any) -> None:
        """Add the micro-batch to the step's loss, on the device."""
        losses, weight = _weighted_losses(outputs, batch, module.device)
        both = torch.stack([(losses * weight).sum(), weight.sum()])
        self._step_sum = both if self._step_sum is None else self._step_sum + both
        step = trainer.global_step + int(trainer.global_step == self._last_step)
        if isinstance(batch, Mapping) and "keys" in batch and "index" in batch:
            losses = losses.expand(len(batch["keys"]))
            self._pending.append(TrainedSamples(step, batch["index"], list(batch["keys"]), losses))

    def on_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Complete the step's sum, and check if due."""
        assert self._step_sum is not None
        self._sums.append((step, self._step_sum))
        self._step_sum = None
        if module.device.type != "cuda" or step % self.look_every == 0:
            self.look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before weights are validated."""
        self.look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check before weights are saved; a rewind will not skip samples from before a good checkpoint."""
        self.look(trainer)
        checkpoint["callbacks"][KEY] = self.state_dict()  # the state after the check
        if self.detector.streak == 0:
            self._seen = []

    def look(self, trainer: Trainer) -> None:
        """Check the steps since the last check; all processes must call this together.

        Raises:
            LossRewind: the training has diverged; raised on every process.
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
        """Return the highest losses of this process at the step, with infinity for non-finite ones."""
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
        """Return the detector's state."""
        return self.detector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the detector's state."""
        self.detector.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Accept the detector's state under its name in an older version."""
        rename_state(checkpoint, OLD_KEY, KEY)


def guard_streak(checkpoint: Mapping[str, Any]) -> int:
    """Return the number of high steps in a row when a checkpoint was written; 0 without a guard."""
    states = checkpoint.get("callbacks", {})
    return int((states.get(KEY) or states.get(OLD_KEY) or {}).get("streak", 0))


@torch.no_grad()
def weights_are_finite(module: LightningModule) -> Tensor:
    """Return whether all trained weights of this process are finite, as a boolean () on its device, without a sync."""
    weights = local_parts(weight.detach() for weight in module.parameters() if weight.requires_grad)
    return torch.stack(torch._foreach_norm(weights)).isfinite().all()


def _weighted_losses(outputs: Any, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a micro-batch's losses and weights (B,), or its mean loss (1,) with weight 1, or 0 without a loss."""
    if isinstance(outputs, Mapping) and "sample_losses" in outputs:
        losses: Tensor = outputs["sample_losses"].detach().float()
        weight = batch.get("weight") if isinstance(batch, Mapping) else None
        return losses, torch.ones_like(losses) if weight is None else weight
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if loss is None:
        return torch.zeros(1, device=device), torch.zeros(1, device=device)
    mean = loss.detach().float().reshape(1)
    return mean, torch.ones_like(mean)
