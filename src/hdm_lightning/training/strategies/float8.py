"""FP8 (arXiv 2209.05433) matrix products in the blocks, by torchao; weights, gradients, checkpoints are unchanged."""

import torch
from torch import nn

from hdm_lightning.errors import UserError, import_optional
from hdm_lightning.models import XUT
from hdm_lightning.models.attention import Linear

CAPABILITY = (8, 9)
"""Lowest NVIDIA compute capability that supports FP8: RTX 40, L4 and H100."""
MULTIPLE = 16
"""Both sizes of an FP8 matrix must be multiples of this."""
WHERE = "hardware.float8"


def require_float8(kind: str, device: torch.device | None = None) -> None:
    """Check that torchao is installed and the GPU supports FP8.

    Args:
        kind: `cuda` or `cpu`.
        device: a CUDA device; None is the current one.

    Raises:
        UserError: torchao is not installed, or the device does not support FP8.
    """
    if kind != "cuda":
        raise UserError("a CPU does not support FP8", where=WHERE, hint=f"set {WHERE}=false")
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < CAPABILITY:
        card, needed = f"{torch.cuda.get_device_name(device)} ({found[0]}.{found[1]})", ".".join(map(str, CAPABILITY))
        what = f"{card} does not support FP8, which needs compute capability {needed} or later"
        raise UserError(what, where=WHERE, hint=f"set {WHERE}=false: bfloat16 or float16 is fastest on this card")
    import_optional("torchao.float8", "lowbit", where=WHERE)


def use_float8(network: XUT) -> None:
    """Multiply the blocks' matrices in FP8, each tensor scaled by its largest value; a second call does nothing.

    Embeddings, modulation and output keep the training's precision. Names in a state dict do not change.

    Raises:
        UserError: torchao is not installed.
    """
    library = import_optional("torchao.float8", "lowbit", where=WHERE)
    # A weight's gradient is a product over rows, of any number: they are padded to a multiple that FP8 supports.
    config = library.Float8LinearConfig(pad_inner_dim=True)
    for block in network.blocks():
        library.convert_to_float8_training(block, config=config, module_filter_fn=_is_suitable)


def _is_suitable(module: nn.Module, name: str) -> bool:
    """Return whether a layer is a trained matrix of supported sizes that is not converted yet.

    A frozen layer under an adapter would compute a gradient that is not used.
    """
    del name
    if type(module) is not Linear or not module.weight.requires_grad:
        return False
    return not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
