"""The released HDM network: its architecture keys and its state dict, read and written bit for bit.

Wiring and names: arXiv 2509.06068 and the checkpoints published with it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.interop.tensor_files import check_tensors, listed
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig
from hdm_lightning.models.conditioning import time_frequencies
from hdm_lightning.models.config import WIRING

PREFIXES = ("unet.model.", "model.", "")
"""Usual prefixes of the network's names: single files and .ckpt, diffusers folders, bare state dicts.

Trainers and other programs use prefixes of their own: anything in front of the names that only an XUT has counts as
one.
"""
_COMPILED = "_orig_mod."
"""Inserted by torch.compile in front of the names of a wrapped module."""
_SCALED = ".scale_weight"
"""Ending of tensor names that marks scaled float8 weights, which only ComfyUI reads."""

BESIDE = ("vae.", "te.", "vae_mean", "vae_std")
"""Prefixes of the names of other parts that a network's file may contain."""

_PATCH, _CONTEXT = "in_patch.proj.weight", "ctx_proj.weight"
_ROPE, _HIDDEN = "backbone.enc_blocks.0.0.attn.rope.freqs", "backbone.enc_blocks.0.0.mlp.w3.weight"

TELLING: Mapping[str, int] = {_PATCH: 4, _CONTEXT: 2, _ROPE: 3, _HIDDEN: 2}
"""Published names that every XUT and nothing else has, and their dimensions; their shapes determine the XUT's."""

TEXT_ENCODERS: Mapping[int, str] = {
    640: "google/gemma-3-270m",
    1024: "Qwen/Qwen3-0.6B",
    1152: "google/gemma-3-1b-pt",
}
"""Table 1 of arXiv 2509.06068: the text encoders of the three sizes, by the width of their hidden states."""

LATENT_MEAN, LATENT_STD = (-3.86596, -1.33539, 0.83537, 0.90989), (10.03651, 6.84843, 7.21382, 5.59132)
"""Latent statistics of the autoencoder that the released networks were trained with (conf/vae/eq_sdxl.yaml)."""

CONTEXT_LENGTH = 512
SAMPLING: Mapping[str, Any] = {"height": 1024, "width": 1024, "guidance_scale": 3.0}
"""Context length in tokens and default sampling settings of the released networks."""

_KEYS = {
    "patch_size": "patch_size",
    "input_dim": "channels",
    "dim": "width",
    "ctx_dim": "context_width",
    "heads": "heads",
    "dim_head": "head_dim",
    "mlp_dim": "mlp_width",
    "depth": "depth",
    "enc_blocks": "encoder_blocks",
    "dec_blocks": "decoder_blocks",
}
_ROUTED_KEYS = {"prev_trns_depth": "blocks_before", "post_trns_depth": "blocks_after"}
_FREQUENCIES = "time_embedding.frequencies"


def config_from_json(mapping: Mapping[str, Any]) -> XUTConfig:
    """Build the configuration that the published architecture keys describe, with the published wiring.

    Keys that do not affect the network's shape (``ctx_size``, the routing rate) are ignored; if an unknown key does,
    loading the tensors fails.

    Raises:
        ValueError: a key is missing or has a value that the published network cannot have.
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
    """Return a configuration's published architecture keys. Raises ValueError: the wiring is not the published one."""
    require_published_wiring(config)
    keys: dict[str, Any] = {key: getattr(config, field) for key, field in _KEYS.items()}
    keys["tread_config"] = {key: getattr(config, field) for key, field in _ROUTED_KEYS.items()}
    keys["addon_info_embs_dim"] = 1 if config.aspect_ratio else None
    return keys


def infer_config(tensors: Mapping[str, Tensor]) -> XUTConfig:
    """Infer the configuration of a published network from its tensors alone.

    Raises:
        ValueError: the tensors are not those of an XUT; lists those that a field follows from and that do not fit.
    """
    tensors = strip_prefix(tensors)
    misshaped = [
        f"{name} {tuple(tensors[name].shape)} instead of {dimensions} dimensions"
        for name, dimensions in TELLING.items()
        if name in tensors and tensors[name].dim() != dimensions
    ]
    kinds = {"missing": [name for name in TELLING if name not in tensors], "mis-shaped": misshaped}
    if any(kinds.values()):
        raise ValueError(listed("the network's shape cannot be inferred from the file", kinds))
    patch, rope = tensors[_PATCH], tensors[_ROPE]
    return XUTConfig(
        channels=patch.shape[1],
        patch_size=patch.shape[2],
        width=patch.shape[0],
        mlp_width=tensors[_HIDDEN].shape[-1],
        heads=rope.shape[0],
        head_dim=4 * rope.shape[1],
        context_width=tensors[_CONTEXT].shape[-1],
        depth=_count(tensors, r"backbone\.enc_blocks\.(\d+)\."),
        encoder_blocks=_count(tensors, r"backbone\.enc_blocks\.0\.(\d+)\."),
        decoder_blocks=_count(tensors, r"backbone\.dec_blocks\.0\.(\d+)\."),
        blocks_before=_count(tensors, r"prev_tread_trns\.blocks\.(\d+)\."),
        blocks_after=_count(tensors, r"post_tread_trns\.blocks\.(\d+)\."),
        aspect_ratio="addon_info_embs_proj.0.weight" in tensors,
        **PUBLISHED,
    )


def _count(names: Iterable[str], pattern: str) -> int:
    found = (re.match(pattern, name) for name in names)
    return len({match.group(1) for match in found if match})


def require_published_wiring(config: XUTConfig) -> None:
    """Raise ValueError, naming each field in which the wiring differs from the released network's."""
    different = [
        f"{name}={getattr(config, name)!r} (published: {PUBLISHED[name]!r})"
        for name in WIRING
        if getattr(config, name) != PUBLISHED[name]
    ]
    if different:
        raise ValueError(
            "the published layout cannot record this network's wiring, so a reader would compute something "
            "else with its weights: " + ", ".join(different)
        )


def strip_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the network's tensors under bare published names, without those of VAE and text encoder.

    Raises:
        ValueError: no tensor looks like an XUT's.
    """
    prefix = find_prefix(tensors)
    if prefix is None:
        kinds = {"missing": list(TELLING), "unexpected": list(tensors)}
        raise ValueError(listed("no tensor belongs to an XUT, under any prefix", kinds))
    if any(name.endswith(_SCALED) for name in tensors):
        raise ValueError("the weights are scaled float8, which only ComfyUI reads; use float16 or bfloat16")
    return under(prefix, tensors)


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the additions of torch.compile to their names."""
    return {name.replace(_COMPILED, ""): tensor for name, tensor in tensors.items()}


def find_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix of an XUT's tensor names; None if there is no XUT.

    Of several networks, the one with most of the names in `TELLING` wins, then the one under one of `PREFIXES`.

    Raises:
        ValueError: these rules do not decide.
    """
    found = Counter(name.removesuffix(telling) for name in names for telling in TELLING if _ends_with(name, telling))
    if not found:
        return None
    most = [prefix for prefix, count in found.items() if count == max(found.values())]
    usual = [prefix for prefix in PREFIXES if prefix in most]
    if not usual and len(most) > 1:
        raise ValueError(
            f"there are several networks, under {', '.join(map(repr, sorted(most)))}; keep one in the file"
        )
    return (usual or most)[0]


def _ends_with(name: str, telling: str) -> bool:
    return name.endswith(telling) and (len(name) == len(telling) or name[-len(telling) - 1] == ".")


def load_xut(config: Mapping[str, Any] | XUTConfig, tensors: Mapping[str, Tensor]) -> XUT:
    """Build an XUT with published weights, in the dtype they are stored in.

    `config` has the published architecture keys, or is an `XUTConfig`; `tensors` may have a prefix, and those of other
    parts are ignored. Raises ValueError: tensors are missing, unexpected or mis-shaped; lists them.
    """
    if not isinstance(config, XUTConfig):
        config = config_from_json(config)
    with torch.device("meta"):
        model = XUT(config)
    names, state, bare = published_names(model), model.state_dict(), under(find_prefix(tensors) or "", tensors)
    check_tensors(bare, {names[name]: _published_shape(name, value, config) for name, value in state.items()})
    own = own_tensors(model, bare)
    model.load_state_dict({name: own[name].detach().clone() for name in state}, assign=True)
    return model


def export_state_dict(model: XUT) -> dict[str, Tensor]:
    """Return copies of the model's tensors under bare published names; undoes `load_xut` bit for bit."""
    names = published_names(model)
    exported = {
        names[name]: value.detach().reshape(_published_shape(name, value, model.config)).clone()
        for name, value in model.state_dict().items()
    }
    # Published files have a single dtype; here the frequencies stay in float32 even with half-precision weights.
    frequencies = names[_FREQUENCIES]
    exported[frequencies] = exported[frequencies].to(model.time_embedding.projection.weight.dtype)
    return exported


def own_tensors(model: XUT, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename bare published tensors to our names, in our shapes; the set may be incomplete.

    Tensors whose shape does not fit keep it, and those with unknown names stay as they are.
    """
    state, found = model.state_dict(), dict(tensors)
    for name, published in published_names(model).items():
        tensor = found.pop(published, None)
        if tensor is not None:
            fits = tuple(tensor.shape) == _published_shape(name, state[name], model.config)
            found[name] = tensor.reshape(state[name].shape) if fits else tensor
    if _FREQUENCIES in found:
        found[_FREQUENCIES] = _full_frequencies(found[_FREQUENCIES])
    return found


def is_usual_normalisation(mean: Tensor | None, std: Tensor | None) -> bool:
    """Return whether latents are normalized as for the released networks, to half precision."""
    if mean is None or std is None or mean.numel() != len(LATENT_MEAN):
        return False
    found = torch.cat((mean.double().flatten(), std.double().flatten()))
    return torch.allclose(found, torch.tensor((*LATENT_MEAN, *LATENT_STD), dtype=found.dtype), rtol=2e-3)


def text_encoder_name(config: XUTConfig, *, where: str) -> str:
    """Return the text encoder that the published network of this context width was trained with.

    Raises:
        UserError: no published size has this width.
    """
    if config.context_width not in TEXT_ENCODERS:
        raise UserError(
            f"needs a text encoder of width {config.context_width}, which no published size has",
            where=where,
            hint="name one with --text-encoder (text_encoder= in Python)",
        )
    return TEXT_ENCODERS[config.context_width]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, without it; without one, those that are of no other part."""
    named = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in named.items() if prefix or not name.startswith(BESIDE)}


def _full_frequencies(stored: Tensor) -> Tensor:
    """Restore float32 frequencies from a half-precision file: the formula's values if they round to the stored ones."""
    if stored.dtype.itemsize >= 4:
        return stored
    exact = time_frequencies(2 * stored.numel()).to(stored.device)
    return exact if torch.equal(exact.to(stored.dtype), stored) else stored.float()


def _published_shape(name: str, value: Tensor, config: XUTConfig) -> tuple[int, ...]:
    if name == "patch_embedding.weight":
        return (config.width, config.channels, config.patch_size, config.patch_size)
    if name == _FREQUENCIES:
        return (1, config.width // 2)
    return tuple(value.shape)


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
    """Return the published name of one of our tensors. Raises KeyError: no tensor of an XUT has that name."""
    part, rest = _split(name, _NETWORK)
    if name.startswith("modulation"):
        rest = "." + "".join(_split(rest[1:], _ADAPTIVE_NORM))
    elif numbers := re.match(r"\.(\d+\.)+", rest):
        rest = numbers[0] + "".join(_split(rest[numbers.end() :], _BLOCK))
    return part + rest


def published_names(model: XUT) -> dict[str, str]:
    """Map our names to published names, for every tensor of the model's state dict, in its order."""
    return {name: published_name(name) for name in model.state_dict()}


def _split(name: str, table: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """Return the published name of the part that a name begins with, and the rest of the name."""
    for ours, theirs in table:
        if name == ours or name.startswith(ours + "."):
            return theirs, name[len(ours) :]
    raise KeyError(name)
