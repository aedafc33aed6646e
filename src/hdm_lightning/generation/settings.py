"""How a picture is drawn: everything but its prompt and its seed."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hdm_lightning.diffusion.sampling import SOLVERS
from hdm_lightning.encoders.padding import ON_INDIVISIBLE, OnIndivisible


@dataclass(frozen=True)
class SamplingSettings:
    """Settings that a batch of pictures shares.

    Args:
        height, width: size in pixels, multiples of autoencoder factor × patch unless they are padded.
        negative_prompt: what the unconditional branch of classifier-free guidance reads.
        steps: solver steps.
        solver: a name in `diffusion.sampling.SOLVERS`.
        shift: time-grid shift; above 1 spends more steps near noise.
        guidance_scale: classifier-free guidance; 1 is none.
        guidance_interval: times (low, high) within which classifier-free guidance acts; 1 is noise.
        routing_scale: routing guidance, away from a prediction with more routed tokens; 1 is none.
        conditional_rate: share of image tokens that skip the U in the main branch.
        unconditional_rate: the same in the unconditional branch of classifier-free guidance.
        weak_rate: the same in the weak branch of routing guidance; above `conditional_rate`.
        x_shift, y_shift: camera to the right and down, in position units (half the side of a square image).
        zoom: camera zoom; above 1 is closer.
        strength: image-to-image, the time in (0, 1] at which the given image is mixed with noise.
        on_indivisible: what to do with another size: "refuse" it, or "pad" it to the next multiples, a given image
            by mirroring its edges, and cut the picture back.

    Raises:
        ValueError: naming the setting that is out of its range.
    """

    height: int = 256
    width: int = 256
    negative_prompt: str = ""
    steps: int = 28
    solver: str = "ab2"
    shift: float = 1.0
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    routing_scale: float = 1.0
    conditional_rate: float = 0.0
    unconditional_rate: float = 0.0
    weak_rate: float = 0.5
    x_shift: float = 0.0
    y_shift: float = 0.0
    zoom: float = 1.0
    strength: float = 1.0
    on_indivisible: OnIndivisible = "refuse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        self._require(self.solver in SOLVERS, "solver", f"one of {', '.join(SOLVERS)}")
        self._require(self.on_indivisible in ON_INDIVISIBLE, "on_indivisible", f"one of {', '.join(ON_INDIVISIBLE)}")
        for name in ("height", "width", "steps"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("shift", "guidance_scale", "routing_scale", "x_shift", "y_shift", "zoom"):
            self._require(math.isfinite(getattr(self, name)), name, "a finite number")
        for name in ("shift", "zoom"):
            self._require(getattr(self, name) > 0.0, name, "above 0")
        for name in ("conditional_rate", "unconditional_rate", "weak_rate"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "at least 0 and below 1")
        self._require(0.0 < self.strength <= 1.0, "strength", "above 0 and at most 1")
        interval = self.guidance_interval
        ordered = len(interval) == 2 and 0.0 <= interval[0] <= interval[1] <= 1.0
        self._require(ordered, "guidance_interval", "two times with 0 ≤ low ≤ high ≤ 1")
        if self.routing_scale != 1.0:
            stronger = self.weak_rate > self.conditional_rate
            self._require(stronger, "weak_rate", f"above conditional_rate {self.conditional_rate}")

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    def to_json(self) -> dict[str, Any]:
        """All settings as plain values."""
        return {**asdict(self), "guidance_interval": list(self.guidance_interval)}

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> "SamplingSettings":
        """The settings that `to_json` wrote; those left out take their defaults.

        Raises:
            ValueError: for an unknown key or a value out of its range.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(mapping) - set(known))
        if unknown:
            raise ValueError(f"unknown sampling settings {unknown}, expected some of {known}")
        return cls(**mapping)
