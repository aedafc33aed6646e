"""The reduced precision that is fast on a device: one choice for training, generation, evaluation and timing."""

import torch

from hdm_lightning.errors import UserError

NAMES = ("auto", "float32", "bfloat16", "float16")
BFLOAT16_CAPABILITY = (8, 0)
"""Lowest compute capability whose tensor cores support bfloat16."""


def half_dtype(device: torch.device | None = None) -> torch.dtype:
    """Return bfloat16 on a CUDA device whose tensor cores support it, else float16.

    On older devices (T4, V100, RTX 20) torch emulates bfloat16 slowly, yet its `is_bf16_supported()` returns True.

    Args:
        device: a CUDA device; None is the current one.
    """
    amd = torch.version.hip is not None  # every AMD GPU that torch supports has it
    return torch.bfloat16 if amd or torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY else torch.float16


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype that `auto` computes in: float32 on a CPU, `half_dtype` on a CUDA device."""
    device = torch.device(device)
    return half_dtype(device) if device.type == "cuda" else torch.float32


def encoder_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype of a frozen encoder for `auto`: bfloat16 on a CUDA device that supports it, else float32.

    Never float16: encoders trained in bfloat16 have states beyond its range.
    """
    dtype = default_dtype(device)
    return torch.float32 if dtype == torch.float16 else dtype


def solver_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype to integrate in: float64 on a CPU or a CUDA device, float32 on others, of which some have no float64.

    So that two ways to write the same formula do not differ by rounding; latents are small, and only the network's
    input is rounded.
    """
    return torch.float64 if torch.device(device).type in ("cpu", "cuda") else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name in commands and records, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: str | torch.dtype, *, where: str) -> torch.dtype | None:
    """Return the dtype of a name in `NAMES`, or None for `auto`, which depends on the device used later.

    Args:
        name: a name, or a dtype, which is returned unchanged.
        where: configuration key or argument to name in errors.

    Raises:
        UserError: the name is unknown.
    """
    if isinstance(name, torch.dtype):
        return name
    if name not in NAMES:
        raise UserError(f"is {name!r}, expected one of {', '.join(NAMES)}", where=where, hint="choose auto")
    return None if name == "auto" else getattr(torch, name)
