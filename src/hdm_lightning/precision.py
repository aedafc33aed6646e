"""What `auto` means for the dtype of a network that is only run: decided here, for the device at hand."""

import torch

from hdm_lightning.errors import UserError

NAMES = ("auto", "float32", "bfloat16", "float16")


def auto_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype that suits a device: bfloat16 where CUDA computes in it, float16 on older cards, else float32."""
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


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
