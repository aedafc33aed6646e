"""The shape of a network read off its tensors, for files that carry no configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

SENTINEL = "in_patch.proj.weight"
"""The published name that every XUT has and that nothing beside it ends with."""

_NEEDED = (
    SENTINEL,
    "ctx_proj.weight",
    "backbone.enc_blocks.0.0.attn.rope.freqs",
    "backbone.enc_blocks.0.0.mlp.w3.weight",
)


def infer_fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of an `XUTConfig` that shapes and names determine: all but the wiring.

    Args:
        tensors: bare published names.

    Raises:
        ValueError: a tensor that tells a field is missing or has another number of dimensions.
    """
    for name in _NEEDED:
        if name not in tensors:
            raise ValueError(f"cannot read the network's shape off the file: {name} is missing")
    patch, rope = tensors[SENTINEL], tensors[_NEEDED[2]]
    if patch.dim() != 4 or rope.dim() != 3:
        raise ValueError(
            f"cannot read the network's shape off the file: {SENTINEL} has shape {tuple(patch.shape)}, "
            f"{_NEEDED[2]} {tuple(rope.shape)}"
        )
    return {
        "channels": patch.shape[1],
        "patch_size": patch.shape[2],
        "width": patch.shape[0],
        "mlp_width": tensors[_NEEDED[3]].shape[-1],
        "heads": rope.shape[0],
        "head_dim": 4 * rope.shape[1],
        "context_width": tensors["ctx_proj.weight"].shape[-1],
        "depth": _count(tensors, r"backbone\.enc_blocks\.(\d+)\."),
        "encoder_blocks": _count(tensors, r"backbone\.enc_blocks\.0\.(\d+)\."),
        "decoder_blocks": _count(tensors, r"backbone\.dec_blocks\.0\.(\d+)\."),
        "blocks_before": _count(tensors, r"prev_tread_trns\.blocks\.(\d+)\."),
        "blocks_after": _count(tensors, r"post_tread_trns\.blocks\.(\d+)\."),
        "aspect_ratio": "addon_info_embs_proj.0.weight" in tensors,
    }


def _count(names: Iterable[str], pattern: str) -> int:
    found = (re.match(pattern, name) for name in names)
    return len({match.group(1) for match in found if match})
