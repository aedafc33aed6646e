"""Tells from the losses of successive steps that a training has gone wrong. Plain numbers, no tensors."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """A step at which the training counts as gone wrong.

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
