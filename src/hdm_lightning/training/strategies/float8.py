"""The blocks' matrices multiplied in FP8 (arXiv 2209.05433), by torchao; weights, gradients and checkpoints stay."""

import torch
from torch import nn

from hdm_lightning.errors import UserError, import_optional
from hdm_lightning.models import XUT
from hdm_lightning.models.attention import Linear

CAPABILITY = (8, 9)
"""Compute capability from which on NVIDIA's matrix units take FP8: RTX 40, L4 and H100."""
MULTIPLE = 16
"""Of both sizes of a matrix that the units take."""
WHERE = "hardware.float8"


def require_float8(kind: str, device: torch.device | None = None) -> None:
    """Check that the library is there and the card can.

    Args:
        kind: `cuda` or `cpu`.
        device: a CUDA device; None is the current one.

    Raises:
        UserError: what is missing.
    """
    if kind != "cuda":
        raise UserError("a CPU does not multiply in FP8", where=WHERE, hint=f"leave {WHERE}=false")
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < CAPABILITY:
        card, needed = f"{torch.cuda.get_device_name(device)} ({found[0]}.{found[1]})", ".".join(map(str, CAPABILITY))
        what = f"{card} does not multiply in FP8, as cards of compute capability {needed} and later do"
        raise UserError(what, where=WHERE, hint=f"leave {WHERE}=false: bfloat16 or float16 is this card's fastest")
    import_optional("torchao.float8", "lowbit", where=WHERE)


def use_float8(network: XUT) -> None:
    """Multiply the blocks' matrices in FP8, each tensor scaled by its largest value; done already, nothing changes.

    Embeddings, modulation and output stay in the training's precision. Names in a state dict do not change.

    Raises:
        UserError: torchao is not installed.
    """
    library = import_optional("torchao.float8", "lowbit", where=WHERE)
    # The gradient of a weight multiplies over rows, whose number may be any: it is filled up to what the units take.
    config = library.Float8LinearConfig(pad_inner_dim=True)
    for block in network.blocks():
        library.convert_to_float8_training(block, config=config, module_filter_fn=_is_suitable)


def _is_suitable(module: nn.Module, name: str) -> bool:
    """Whether a layer is a trained matrix that is not converted yet and that the units take.

    A frozen one beside an adapter would get a gradient that nobody uses.
    """
    del name
    if type(module) is not Linear or not module.weight.requires_grad:
        return False
    return not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
