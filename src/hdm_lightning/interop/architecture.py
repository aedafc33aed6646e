"""The shape of a network read off its tensors, for files that carry no configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from hdm_lightning.interop.mismatch import listed

_PATCH, _CONTEXT = "in_patch.proj.weight", "ctx_proj.weight"
_ROPE, _HIDDEN = "backbone.enc_blocks.0.0.attn.rope.freqs", "backbone.enc_blocks.0.0.mlp.w3.weight"

TELLING: Mapping[str, int] = {_PATCH: 4, _CONTEXT: 2, _ROPE: 3, _HIDDEN: 2}
"""Published names that every XUT has and nothing beside it, which tell its shape, and their numbers of dimensions."""


def infer_fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of an `XUTConfig` that shapes and names determine: all but the wiring.

    Args:
        tensors: bare published names.

    Raises:
        ValueError: tensors that tell a field are missing or have another number of dimensions; the message lists
            them.
    """
    missing = [name for name in TELLING if name not in tensors]
    misshaped = [
        f"{name} {tuple(tensors[name].shape)} instead of {dimensions} dimensions"
        for name, dimensions in TELLING.items()
        if name in tensors and tensors[name].dim() != dimensions
    ]
    if missing or misshaped:
        parts = (listed("missing", missing), listed("mis-shaped", misshaped))
        raise ValueError(
            "the network's shape cannot be read off the file\n" + "\n".join(part for part in parts if part)
        )
    patch, rope = tensors[_PATCH], tensors[_ROPE]
    return {
        "channels": patch.shape[1],
        "patch_size": patch.shape[2],
        "width": patch.shape[0],
        "mlp_width": tensors[_HIDDEN].shape[-1],
        "heads": rope.shape[0],
        "head_dim": 4 * rope.shape[1],
        "context_width": tensors[_CONTEXT].shape[-1],
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
