"""Parameter names of this project against those of the published checkpoints.

A name is translated segment by segment: the prefix says which part of the network, the rest which tensor of it.
"""

from __future__ import annotations

import re

from hdm_lightning.models import XUT

_NETWORK = (
    ("patch_embedding", "in_patch.proj"),
    ("output_projection", "out_patch.proj"),
    ("text_projection", "ctx_proj"),
    ("time_embedding.frequencies", "time_emb.freqs"),
    ("time_embedding.projection", "time_emb.proj.0"),
    ("aspect_embedding.input", "addon_info_embs_proj.0"),
    ("aspect_embedding.output", "addon_info_embs_proj.2"),
    ("modulation.self_attention", "shared_adaln_attn"),
    ("modulation.cross_attention", "shared_adaln_xattn"),
    ("modulation.feed_forward", "shared_adaln_ffw"),
    ("blocks_before", "prev_tread_trns.blocks"),
    ("blocks_after", "post_tread_trns.blocks"),
    ("encoder", "backbone.enc_blocks"),
    ("decoder", "backbone.dec_blocks"),
)
_ADAPTIVE_NORM = (("norm", "0"), ("hidden", "1"), ("output", "3"))
_BLOCK = (
    ("self_attention_norm.weight", "attn_pre_norm.norm.weight"),
    ("cross_attention_norm.weight", "xattn_pre_norm.norm.weight"),
    ("feed_forward_norm.weight", "mlp_pre_norm.norm.weight"),
    ("self_attention.qkv", "attn.qkv"),
    ("self_attention.output", "attn.out"),
    ("self_attention.log_frequencies", "attn.rope.freqs"),
    ("cross_attention.query", "xattn.q"),
    ("cross_attention.key_value", "xattn.kv"),
    ("cross_attention.output", "xattn.out"),
    ("cross_attention.log_frequencies", "xattn.rope.freqs"),
    ("feed_forward.input", "mlp.w12"),
    ("feed_forward.output", "mlp.w3"),
)


def published_name(name: str) -> str:
    """The published name of one of our tensors.

    Raises:
        KeyError: no tensor of an XUT has that name.
    """
    part, rest = _split(name)
    published_part = dict(_NETWORK)[part]
    if part.startswith("modulation"):
        rest = _replace_prefix(rest, _ADAPTIVE_NORM)
    elif rest and rest[0].isdigit():
        indices, tensor = re.fullmatch(r"((?:\d+\.)+)(.*)", rest).groups()  # type: ignore[union-attr]
        rest = indices + _replace_prefix(tensor, _BLOCK)
    return f"{published_part}.{rest}" if rest else published_part


def published_names(model: XUT) -> dict[str, str]:
    """Our name → published name, for every tensor of the model's state dict, in its order."""
    return {name: published_name(name) for name in model.state_dict()}


def _split(name: str) -> tuple[str, str]:
    for part, _ in _NETWORK:
        if name == part or name.startswith(part + "."):
            return part, name[len(part) + 1 :]
    raise KeyError(name)


def _replace_prefix(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in table:
        if name == ours or name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    raise KeyError(name)
