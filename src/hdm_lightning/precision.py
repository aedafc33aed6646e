"""The lower precision that a device is fast in: one answer for training, drawing, evaluation and timing."""

import torch

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


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype that `auto` computes in: float32 on a CPU, `half_dtype` on a CUDA device."""
    return half_dtype(device) if device.type == "cuda" else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as commands and records name it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
