"""Guidance: away from a weaker prediction, along the line to a stronger one.

Shapes: velocities (B, ...).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hdm_lightning.diffusion.sampling import Velocity


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


def guided(strong: Velocity, guides: Sequence[Guide]) -> Velocity:
    """The strong velocity pushed away from each weak one: strong + Σ (scaleᵢ − 1)·(strong − weakᵢ).

    With one guide this is `extrapolate(weak, strong, scale)`.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        base = strong(x, t)
        total = base
        for guide in guides:
            if guide.acts_at(t):
                total = total + extrapolate(guide.velocity(x, t), base, guide.scale) - base
        return total

    return velocity
