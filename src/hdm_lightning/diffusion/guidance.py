"""Guidance: away from a weaker prediction, along the line to a stronger one.

Shapes: velocities (B, ...).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hdm_lightning.diffusion.sampling import Velocity

Evaluate = Callable[[Sequence[Any], Tensor, float], Sequence[Tensor]]
"""(velocities, x, t) -> each one's value there."""


def one_by_one(velocities: Sequence[Velocity], x: Tensor, t: float) -> list[Tensor]:
    """The values of velocities at one point, one after the other."""
    return [velocity(x, t) for velocity in velocities]


def extrapolate(weak: Tensor, strong: Tensor, scale: float) -> Tensor:
    """weak + scale·(strong − weak): 0 is the weak prediction, 1 the strong one, above 1 beyond it.

    With the unconditional prediction as the weak one this is classifier-free guidance (arXiv 2207.12598), with a
    prediction of more routed tokens it is routing guidance (arXiv 2501.04765, section 3.3).
    """
    return weak + scale * (strong - weak)


@dataclass(frozen=True)
class Guide:
    """A weaker prediction to be guided away from.

    Args:
        velocity: the weak prediction: without the prompt, or with a higher routing rate.
        scale: 1 has no effect and costs no evaluation.
        interval: times (low, high) within which the guide acts (arXiv 2404.07724); outside, it costs nothing.
    """

    velocity: Velocity
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"interval: got {self.interval}, expected 0 ≤ low ≤ high ≤ 1")

    def acts_at(self, t: float) -> bool:
        """Whether the guide changes the velocity at time t."""
        return self.scale != 1.0 and self.interval[0] <= t <= self.interval[1]


@dataclass(frozen=True)
class Pushed:
    """The strong velocity pushed away from each weak one: strong + Σ (scaleᵢ − 1)·(strong − weakᵢ), at any time.

    With one guide this is `extrapolate(weak, strong, scale)`.

    Args:
        strong: the prediction to be improved.
        guides: the weaker ones, whatever their intervals.
        evaluate: gives the values of the strong velocity and of the guides', in this order.
    """

    strong: Velocity
    guides: tuple[Guide, ...]
    evaluate: Evaluate

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The value at (x, t)."""
        base, *weaker = self.evaluate([self.strong, *(guide.velocity for guide in self.guides)], x, t)
        total = base
        for guide, weak in zip(self.guides, weaker, strict=True):
            total = total + extrapolate(weak, base, guide.scale) - base
        return total


@dataclass(frozen=True)
class Guided:
    """The strong velocity pushed away from the weak ones whose intervals hold the time, see `Pushed`.

    It jumps where a guide begins or ends to act; the solvers ask for the `piece` that a step is made with.
    """

    strong: Velocity
    guides: tuple[Guide, ...]
    evaluate: Evaluate

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The value at (x, t)."""
        return self.piece(t)(x, t)

    def piece(self, t: float) -> Pushed:
        """The velocity under the guides that act at time t, also for other times."""
        return Pushed(self.strong, tuple(guide for guide in self.guides if guide.acts_at(t)), self.evaluate)


def guided(strong: Velocity, guides: Sequence[Guide], evaluate: Evaluate = one_by_one) -> Guided:
    """The strong velocity guided away from weaker ones.

    Args:
        strong: the prediction to be improved.
        guides: the weaker ones.
        evaluate: gives the values of the strong velocity and of the guides that act at a time, in this order;
            for velocities that are cheaper together.
    """
    return Guided(strong, tuple(guides), evaluate)
