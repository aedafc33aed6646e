"""The three branches of an EQ-VAE step, each with its decoder input and target, and the draws of one and of a patch.

Shapes: image (B,3,f·H,f·W); latent (B,C,H,W); noise = standard normal, in the latent's shape.

One branch is drawn for the whole global batch (arXiv 2502.09509, section 4), from the seed and the number of samples
seen so far, never from the rank, so that all ranks of a step work on equal shapes and the same τ.
"""

import random
from dataclasses import dataclass
from enum import StrEnum

from hdm_lightning.autoencoding.transforms import (
    IDENTITY,
    Crop,
    Flip,
    QuarterTurn,
    Scale,
    Sequential,
    Transform,
    exact_scales,
)


class Branch(StrEnum):
    """A branch of a step: decoder input -> target."""

    EQUIVARIANT = "equivariant"  # τ(z) -> τ(x)
    DOWNSCALED = "downscaled"  # z of s·x -> s·x
    PLAIN = "plain"  # z -> x


@dataclass(frozen=True)
class BranchSettings:
    """The distribution of branches and transforms.

    The defaults are EQ-VAE's (arXiv 2502.09509, section 4): half of the steps equivariant, a quarter of the rest on
    downscaled images, τ = scale by {8…31}/32 then 1…3 quarter turns. `BranchSettings.anime()` is the variant of the
    anime EQ-SDXL-VAE, `BranchSettings.off()` plain reconstruction.

    Args:
        equivariant: probability of the equivariant branch, in [0, 1].
        downscaled: probability of the downscaled branch, in [0, 1 - equivariant].
        scale_numerators: n of the scales n/scale_denominator, none above 1; scales without an exact size are not
            drawn.
        scale_denominator: denominator of the scales.
        quarter_turns: numbers of quarter turns to draw from.
        anisotropic: draw the scales of height and width independently.
        antialias: scale with an antialiasing filter; the published experiment does not.
        flips: mirror target and latent left-right with probability 1/2 in the equivariant branch.
    """

    equivariant: float = 0.5
    downscaled: float = 0.125
    scale_numerators: tuple[int, ...] = tuple(range(8, 32))
    scale_denominator: int = 32
    quarter_turns: tuple[int, ...] = (1, 2, 3)
    anisotropic: bool = False
    antialias: bool = False
    flips: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.equivariant <= 1 or not 0 <= self.downscaled <= 1 - self.equivariant + 1e-9:
            raise ValueError(
                f"equivariant, downscaled: probabilities {self.equivariant} and {self.downscaled} must be in [0, 1] "
                "and sum to at most 1"
            )
        if self.scale_denominator < 1 or any(n < 1 for n in self.scale_numerators):
            raise ValueError("scale_numerators, scale_denominator: expected positive whole numbers")
        if any(n > self.scale_denominator for n in self.scale_numerators):
            raise ValueError(
                f"scale_numerators: got {max(self.scale_numerators)}/{self.scale_denominator}, expected at most 1"
            )
        moves = self.flips or any(turns % 4 for turns in self.quarter_turns)
        scales = any(n < self.scale_denominator for n in self.scale_numerators)
        if self.equivariant and not moves and not scales:
            raise ValueError(
                "equivariant: scale_numerators, quarter_turns and flips leave every image unchanged; "
                "expected a transform, or probability 0"
            )
        if self.downscaled and not scales:
            raise ValueError("downscaled: scale_numerators has no scale below 1; expected one, or probability 0")

    @classmethod
    def anime(cls) -> "BranchSettings":
        """Return the settings of the anime EQ-SDXL-VAE: 0.65 equivariant, the rest plain, scales {8,10,…,30}/32."""
        return cls(equivariant=0.65, downscaled=0.0, scale_numerators=tuple(range(8, 31, 2)))

    @classmethod
    def off(cls) -> "BranchSettings":
        """Return plain reconstruction only: the control of an EQ-VAE experiment."""
        return cls(equivariant=0.0, downscaled=0.0)


@dataclass(frozen=True)
class Draw:
    """The branch of one step and its transform, the identity for the plain branch."""

    branch: Branch
    transform: Transform = IDENTITY


def draw_branch(settings: BranchSettings, height: int, width: int, *, seed: int, samples_seen: int) -> Draw:
    """Draw the branch and τ of one step.

    Args:
        settings: probabilities and ranges.
        height: latent rows.
        width: latent columns.
        seed: the run's seed.
        samples_seen: samples seen by all ranks together before this step; the same on every rank.

    Raises:
        ValueError: no scale gives a whole number of cells for this latent size.
    """
    source = random.Random(f"eq-vae branch {seed} {samples_seen}")
    where = source.random()
    if where < settings.equivariant:
        return Draw(Branch.EQUIVARIANT, _draw_transform(settings, height, width, source))
    if where < settings.equivariant + settings.downscaled:
        return Draw(Branch.DOWNSCALED, _draw_scale(settings, height, width, source))
    return Draw(Branch.PLAIN)


def _draw_transform(settings: BranchSettings, height: int, width: int, source: random.Random) -> Sequential:
    steps: list[Transform] = [_draw_scale(settings, height, width, source)]
    if settings.quarter_turns:
        steps.append(QuarterTurn(source.choice(list(settings.quarter_turns))))
    if settings.flips and source.random() < 0.5:
        steps.append(Flip())
    return Sequential(tuple(steps))


def _draw_scale(settings: BranchSettings, height: int, width: int, source: random.Random) -> Transform:
    if not settings.scale_numerators:
        return IDENTITY
    rows = exact_scales(height, settings.scale_numerators, settings.scale_denominator)
    columns = exact_scales(width, settings.scale_numerators, settings.scale_denominator)
    both = [scale for scale in rows if scale in columns]
    if not rows or not columns or (not both and not settings.anisotropic):
        raise ValueError(
            f"scale_numerators: no scale n/{settings.scale_denominator} gives a whole size for {height}×{width} cells"
        )
    if settings.anisotropic:
        return Scale(source.choice(rows), source.choice(columns), settings.antialias)
    return Scale.uniform(source.choice(both), settings.antialias)


def draw_patch(height: int, width: int, size: int, *, seed: int, samples_seen: int) -> Crop:
    """Return a size × size box (in latent cells) at a random position: a cheap step before training on whole images.

    Args:
        height: latent rows.
        width: latent columns.
        size: side of the box, at most `height` and `width`.
        seed: the run's seed.
        samples_seen: samples seen by all ranks together so far; the same on every rank.
    """
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size: got {size} cells, expected 1…{min(height, width)} for a {height}×{width} latent")
    source = random.Random(f"vae patch {seed} {samples_seen}")
    return Crop(source.randint(0, height - size), source.randint(0, width - size), size, size)
