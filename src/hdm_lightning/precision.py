"""The lower precision that a device is fast in: one answer for training, drawing, evaluation and timing."""

import torch

from hdm_lightning.errors import UserError

NAMES = ("auto", "float32", "bfloat16", "float16")
BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability from which on NVIDIA's matrix units take bfloat16."""


def half_dtype(device: torch.device | None = None) -> torch.dtype:
    """bfloat16 on a CUDA device whose matrix units take it, else float16.

    On older ones (T4, V100, RTX 20) torch emulates bfloat16, slowly, and its `is_bf16_supported()` says yes.

    Args:
        device: a CUDA device; None is the current one.
    """
    amd = torch.version.hip is not None  # all of AMD's that torch supports have it
    return torch.bfloat16 if amd or torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY else torch.float16


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype that `auto` computes in: float32 on a CPU, `half_dtype` on a CUDA device."""
    device = torch.device(device)
    return half_dtype(device) if device.type == "cuda" else torch.float32


def encoder_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype that `auto` means for a frozen encoder: bfloat16 on a CUDA device that has it, float32 elsewhere.

    Never float16: encoders that were trained in bfloat16 have states beyond its range.
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
    """A dtype as commands and records name it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: str | torch.dtype, *, where: str) -> torch.dtype | None:
    """The dtype of a name in `NAMES`, or None for `auto`: that of the device the network will be on.

    Args:
        name: a name, or a dtype that is returned as it is.
        where: configuration key or argument to name in errors.

    Raises:
        UserError: no such name.
    """
    if isinstance(name, torch.dtype):
        return name
    if name not in NAMES:
        raise UserError(f"is {name!r}, expected one of {', '.join(NAMES)}", where=where, hint="choose auto")
    return None if name == "auto" else getattr(torch, name)
