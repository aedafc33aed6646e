"""What fits together: encoders to a network, and what is asked for to both."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.generation.settings import SamplingSettings

MAX_SEED = 2**63 - 1


def require_fit(where: str, what: str, got: int, expected: int) -> None:
    """Raise UserError if an encoder does not fit the network."""
    if got != expected:
        raise UserError(
            f"gives {got} {what}, while the network was made for {expected}",
            where=where,
            hint="use the one the network was trained with",
        )


def check_request(
    prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings, images: Tensor | None, multiple: int
) -> None:
    """Raise ValueError, naming the argument, unless these can be drawn.

    Args:
        prompts, seeds: B each.
        settings: of all pictures.
        images: uint8 (B, 3, H, W) to start from, or None.
        multiple: what heights and widths must divide by, unless they are padded.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"seeds: got {len(seeds)} for {len(prompts)} prompts, expected one each")
    if not all(0 <= seed <= MAX_SEED for seed in seeds):
        raise ValueError(f"seeds: got {list(seeds)}, expected 0 … 2⁶³ − 1")
    for name in ("height", "width"):
        if getattr(settings, name) % multiple and settings.on_indivisible == "refuse":
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected a multiple of {multiple}")
    if images is not None:
        expected = (len(prompts), 3, settings.height, settings.width)
        if tuple(images.shape) != expected or images.dtype != torch.uint8:
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, expected uint8 {expected}")
