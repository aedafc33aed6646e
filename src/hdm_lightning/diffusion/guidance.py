"""Guidance: move a prediction further away from a weaker one.

Shapes: velocities (B, ...).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hdm_lightning.diffusion.sampling import Velocity

Evaluate = Callable[[Sequence[Any], Tensor, float], Sequence[Tensor]]
"""(velocities, x, t) -> the value of each velocity at (x, t)."""


def one_by_one(velocities: Sequence[Velocity], x: Tensor, t: float) -> list[Tensor]:
    """Return the value of each velocity at (x, t), evaluated one after the other."""
    return [velocity(x, t) for velocity in velocities]


def extrapolate(weak: Tensor, strong: Tensor, scale: float) -> Tensor:
    """Return weak + scale·(strong − weak): scale 0 is the weak prediction, 1 the strong one, above 1 beyond it.

    With the unconditional prediction as the weak one this is classifier-free guidance (arXiv 2207.12598); with a
    prediction that routes more tokens it is routing guidance (arXiv 2501.04765, section 3.3).
    """
    return weak + scale * (strong - weak)


@dataclass(frozen=True)
class Guide:
    """A weaker prediction to guide away from.

    Args:
        velocity: the weak prediction: without the prompt, or with a higher routing rate.
        scale: guidance scale; 1 has no effect and costs no evaluation.
        interval: times (low, high) within which the guide acts (arXiv 2404.07724); outside it costs nothing.
    """

    velocity: Velocity
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"interval: got {self.interval}, expected 0 ≤ low ≤ high ≤ 1")

    def acts_at(self, t: float) -> bool:
        """Return whether the guide changes the velocity at time t."""
        return self.scale != 1.0 and self.interval[0] <= t <= self.interval[1]


@dataclass(frozen=True)
class Guided:
    """The strong velocity guided away from weaker ones at time t: strong + Σ (scaleᵢ − 1)·(strong − weakᵢ).

    The sum is over the guides whose intervals contain t; with one guide this is `extrapolate(weak, strong, scale)`. It
    jumps where a guide starts or stops acting; the solvers integrate each step with one `piece`.

    Args:
        strong: the prediction to improve.
        guides: the weaker predictions.
        evaluate: evaluates the strong velocity and those of the guides that act at a time, in this order; pass
            one of your own where a joint evaluation is cheaper.
    """

    strong: Velocity
    guides: tuple[Guide, ...]
    evaluate: Evaluate = one_by_one

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Return the value at (x, t)."""
        acting = [guide for guide in self.guides if guide.acts_at(t)]
        base, *weaker = self.evaluate([self.strong, *(guide.velocity for guide in acting)], x, t)
        total = base
        for guide, weak in zip(acting, weaker, strict=True):
            total = total + extrapolate(weak, base, guide.scale) - base
        return total

    def piece(self, t: float) -> "Guided":
        """Return the velocity under the guides that act at time t, at all times."""
        acting = (replace(guide, interval=(0.0, 1.0)) for guide in self.guides if guide.acts_at(t))
        return replace(self, guides=tuple(acting))
