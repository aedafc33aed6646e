"""The released HDM network: its architecture keys and its state dict, read and written bit for bit.

Wiring and names: arXiv 2509.06068 and the checkpoints published with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.interop.mismatch import check_tensors
from hdm_lightning.interop.names import published_names
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig

PREFIXES = ("unet.model.", "model.", "")
"""What stands before the network's names: single files and .ckpt, diffusers folders, bare state dicts."""

_KEYS = {
    "input_dim": "channels",
    "patch_size": "patch_size",
    "dim": "width",
    "mlp_dim": "mlp_width",
    "heads": "heads",
    "dim_head": "head_dim",
    "ctx_dim": "context_width",
    "depth": "depth",
    "enc_blocks": "encoder_blocks",
    "dec_blocks": "decoder_blocks",
}
_ROUTED_KEYS = {"prev_trns_depth": "blocks_before", "post_trns_depth": "blocks_after"}
_SENTINEL = "in_patch.proj.weight"


def config_from_json(mapping: Mapping[str, Any]) -> XUTConfig:
    """The configuration that the published architecture keys describe, in the published wiring.

    Keys that say nothing about the network's shape (``ctx_size``, the TREAD rate) are passed over; what else an
    unknown key may mean shows when tensors are loaded.

    Raises:
        ValueError: a key is missing or its value is not one that the published network can have.
    """
    missing = sorted(key for key in _KEYS if key not in mapping)
    if missing:
        raise ValueError(f"architecture keys {missing} are missing; got {sorted(mapping)}")
    values = {field: mapping[key] for key, field in _KEYS.items()}
    routed = mapping.get("tread_config") or {}
    values |= {field: routed.get(key, 0) for key, field in _ROUTED_KEYS.items()}
    extra_inputs = mapping.get("addon_info_embs_dim") or 0
    if extra_inputs not in (0, 1):
        raise ValueError(f"addon_info_embs_dim is {extra_inputs}; expected 0 or 1 (the aspect ratio)")
    return XUTConfig(**values, aspect_ratio=bool(extra_inputs), **PUBLISHED)


def config_to_json(config: XUTConfig) -> dict[str, Any]:
    """The published architecture keys of a configuration.

    Raises:
        ValueError: the wiring is not the published one.
    """
    require_published_wiring(config)
    keys: dict[str, Any] = {key: getattr(config, field) for key, field in _KEYS.items()}
    keys["tread_config"] = {key: getattr(config, field) for key, field in _ROUTED_KEYS.items()}
    keys["addon_info_embs_dim"] = 1 if config.aspect_ratio else None
    return keys


def require_published_wiring(config: XUTConfig) -> None:
    """Raise ValueError that names each field in which the wiring differs from the released network's."""
    different = [
        f"{name}={getattr(config, name)!r} (published: {PUBLISHED[name]!r})"
        for name in ("residual", "skips", "positions")
        if getattr(config, name) != PUBLISHED[name]
    ]
    if different:
        raise ValueError(
            "the published layout cannot describe this network, as its wiring differs: " + ", ".join(different)
        )


def strip_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors under bare published names, without what stands beside them (VAE, text encoder).

    Raises:
        ValueError: no tensor looks like an XUT's.
    """
    for prefix in PREFIXES:
        if prefix + _SENTINEL in tensors:
            return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    raise ValueError(f"no tensor is named {_SENTINEL!r}, with any of the prefixes {PREFIXES}; is this an XUT?")


def load_xut(config: Mapping[str, Any] | XUTConfig, tensors: Mapping[str, Tensor]) -> XUT:
    """An XUT with published weights, in the dtype they are stored in.

    Args:
        config: the published architecture keys, or a configuration of this project.
        tensors: published names, with or without one of `PREFIXES`; tensors beside the network (``vae.``,
            ``te.``, ``vae_mean``, ``vae_std``) are passed over.

    Raises:
        ValueError: tensors are missing, unexpected or mis-shaped; the message lists them.
    """
    if not isinstance(config, XUTConfig):
        config = config_from_json(config)
    with torch.device("meta"):
        model = XUT(config)
    names = published_names(model)
    wanted = {names[name]: _published_shape(name, value, config) for name, value in model.state_dict().items()}
    found = _network_only(strip_prefix(tensors))
    check_tensors(found, wanted)
    state = {
        name: found[names[name]].detach().reshape(value.shape).clone() for name, value in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)
    return model


def export_state_dict(model: XUT) -> dict[str, Tensor]:
    """The model's tensors under bare published names, copied; undoes `load_xut` bit for bit."""
    names = published_names(model)
    return {
        names[name]: value.detach().reshape(_published_shape(name, value, model.config)).clone()
        for name, value in model.state_dict().items()
    }


def _published_shape(name: str, value: Tensor, config: XUTConfig) -> tuple[int, ...]:
    if name == "patch_embedding.weight":
        return (config.width, config.channels, config.patch_size, config.patch_size)
    if name == "time_embedding.frequencies":
        return (1, config.width // 2)
    return tuple(value.shape)


def _network_only(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what lies beside a network whose names have no prefix of their own."""
    beside = ("vae.", "te.", "vae_mean", "vae_std")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(beside)}
