"""Tensors of adapters and their names in files: peft's, diffusers', ComfyUI's, kohya's, lycoris-lora's."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_layers import (
    HADAMARD,
    KRONECKER,
    LORA,
    AdapterLayer,
    Hadamard,
    Kronecker,
    LowRank,
    kronecker_parts,
)
from hdm_lightning.interop.pipeline_folder import NETWORK_PREFIX
from hdm_lightning.interop.tensor_files import require_finite
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.printable import in_one_line

PEFT = "base_model.model."
PREFIXES = {"lora": f"transformer.{NETWORK_PREFIX}", "lora_comfyui": "diffusion_model."}
"""Prefix of layer names in a single file, by its layout."""
_PREFIXES = (*PREFIXES.values(), "transformer.", f"unet.{NETWORK_PREFIX}", "unet.", NETWORK_PREFIX)
LYCORIS = "lycoris_"
"""Prefix of layer names with underscores instead of dots, in files of lycoris-lora."""
_UNDERSCORED = (LYCORIS, "lora_unet_", "lora_transformer_")
_DOWN, _UP = LORA
_PARTS = {
    **dict.fromkeys((_DOWN, "lora_A.default.weight", "lora_down.weight", "lora.down.weight"), _DOWN),
    **dict.fromkeys((_UP, "lora_B.default.weight", "lora_up.weight", "lora.up.weight"), _UP),
    **{name: name for name in ("alpha", *HADAMARD, *KRONECKER)},
}
"""Part of a layer by the ending of its tensor's name."""
_FOREIGN = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_magnitude_vector.weight": "DoRA",
    "lora_magnitude_vector.default.weight": "DoRA",
    "scalar": "LyCORIS with use_scalar",
    "diff": "LyCORIS full",
    "diff_b": "LyCORIS full",
    "w_norm": "LyCORIS with train_norm",
    "b_norm": "LyCORIS with train_norm",
    "oft_blocks": "OFT",
    "a1.weight": "GLoRA",
    "on_input": "IA3",
    "lambda_layer": "T-LoRA",
    "lora_mid.weight": "LoRA of convolutions",
    "hada_t1": "LoHa of convolutions",
    "lokr_t2": "LoKr of convolutions",
    "lora_B.bias": "LoRA with biases",
}
"""Kinds of adapters that are not supported, by the ending of a tensor's name."""
Scale = Callable[[str], float]
"""Maps a layer's name, as in peft, to its alpha over its rank."""


def split_name(key: str) -> tuple[str, str | None]:
    """Split a tensor's name into its layer and its part in that layer, which is None if it is not an adapter's."""
    for ending, part in _PARTS.items():
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}"), part
    return key, None


def are_of_adapter(keys: Iterable[str]) -> bool:
    """Return whether tensors of these names contain an adapter."""
    return any(split_name(key)[1] not in (None, "alpha") for key in keys)


def layers_of(
    tensors: Mapping[str, Tensor], scale: Scale, where: str, config: XUTConfig | None = None
) -> dict[str, AdapterLayer]:
    """Build the layers of an adapter from a file's tensors.

    Args:
        tensors: by their names in the file.
        scale: scale of layers that state no alpha.
        where: names the file in errors.
        config: configuration of the network; only needed for names with underscores.

    Raises:
        UserError: they are not an adapter of linear layers, of an unsupported kind, or not finite.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    peft_names: dict[str, str] = {}
    underscored = _underscored(config) if config is not None else {}
    for key, tensor in tensors.items():
        stem, part = split_name(key)
        if part is None:
            raise _unknown([key], where)
        stem = stem.removeprefix(PEFT)
        name = _layer_name(stem, underscored)
        parts.setdefault(name, {})[part] = tensor
        peft_names[name] = stem
    odd = [name for name, found in parts.items() if not found.keys() - {"alpha"}]
    if odd or not parts:
        raise _unknown(odd, where)
    try:
        require_finite(tensors)
        return {name: _layer(name, found, scale(peft_names[name])) for name, found in parts.items()}
    except ValueError as error:
        raise UserError(str(error), where=where, hint="get it again, or use an earlier checkpoint of it") from error


def named_tensors(layers: Mapping[str, AdapterLayer], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of layers under peft's names with a prefix."""
    return {f"{prefix}{name}.{end}": value for name, layer in layers.items() for end, value in layer.tensors.items()}


def lycoris_tensors(layers: Mapping[str, AdapterLayer]) -> dict[str, Tensor]:
    """Return the tensors of layers under lycoris-lora's names, with an alpha for each layer."""
    found: dict[str, Tensor] = {}
    of_lora = {_DOWN: "lora_down.weight", _UP: "lora_up.weight"}
    for name, layer in layers.items():
        stem = LYCORIS + name.replace(".", "_")
        found |= {f"{stem}.{of_lora.get(end, end)}": tensor for end, tensor in layer.tensors.items()}
        found[f"{stem}.alpha"] = torch.tensor(float(layer.alpha))
    return found


def _unknown(found: list[str], where: str) -> UserError:
    names = [in_one_line(name) for name in found]
    kinds = [kind for name in found for end, kind in _FOREIGN.items() if name.endswith(f".{end}")]
    if kinds:
        hint = "merge it into its base with the program that trained it, or train a plain LoRA, LoHa or LoKr"
        return UserError(f"is {kinds[0]} ({names[0]}); only plain LoRA, LoHa, LoKr are read", where=where, hint=hint)
    what = f"has tensors that are not a plain LoRA of linear layers: {', '.join(names[:3])}" if names else "is empty"
    return UserError(what, where=where, hint="use a LoRA for this kind of network, such as hdm-convert writes")


def _layer(name: str, found: Mapping[str, Tensor], scale: float) -> AdapterLayer:
    """Build an adapter's layer from its tensors. Raises ValueError: they do not fit each other."""
    alpha, own = found.get("alpha"), {key: tensor for key, tensor in found.items() if key != "alpha"}
    name = in_one_line(name)
    shapes = f"{name} has " + ", ".join(f"{in_one_line(key)} {tuple(tensor.shape)}" for key, tensor in own.items())
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{name} has {alpha.numel()} values of alpha instead of one")
    if not all(tensor.is_floating_point() for tensor in own.values()):
        raise ValueError(f"{shapes} of {', '.join(str(each.dtype) for each in own.values())}, which are not floats")
    if not all(tensor.ndim == 2 and tensor.numel() for tensor in own.values()):
        raise ValueError(f"{shapes}, which are not matrices")
    layer = _of_its_kind(own, shapes)
    if alpha is None:
        return replace(layer, alpha=layer.rank * scale)
    # Without a rank, lycoris-lora scales by 1, whatever alpha it writes.
    return replace(layer, alpha=1.0 if own.keys() == {"lokr_w1", "lokr_w2"} else float(alpha))


def _of_its_kind(own: Mapping[str, Tensor], shapes: str) -> AdapterLayer:
    """Build a layer, for now with an alpha of 0, from matrices of these shapes."""
    if own.keys() == set(LORA):
        if own[_DOWN].shape[0] != own[_UP].shape[1]:
            raise ValueError(f"{shapes}, expected (rank, in) and (out, rank)")
        return LowRank(own, 0.0)
    if own.keys() == set(HADAMARD):
        (out, rank), (first, size), second, last = (own[name].shape for name in HADAMARD)
        if first != rank or second != (out, last[0]) or last[1] != size:
            raise ValueError(f"{shapes}, expected two pairs of (out, rank) and (rank, in)")
        return Hadamard(own, 0.0)
    if not own.keys() <= set(KRONECKER):
        raise ValueError(f"{shapes}, which are neither a LoRA (lora_A, lora_B) nor a LoHa or a LoKr")
    try:
        pairs = [part for part in kronecker_parts(own) if len(part) == 2]
    except ValueError as error:
        raise ValueError(f"{shapes}: {error}") from error
    if len({rank for one, other in pairs for rank in (one.shape[1], other.shape[0])}) > 1:
        raise ValueError(f"{shapes}, expected pairs of (size, rank) and (rank, size) with one rank")
    return Kronecker(own, 0.0)


def _layer_name(stem: str, underscored: Mapping[str, str]) -> str:
    for prefix in _UNDERSCORED:
        if stem.startswith(prefix):
            return underscored.get(stem.removeprefix(prefix), stem)
    for prefix in _PREFIXES:
        if stem.startswith(prefix):
            return stem.removeprefix(prefix)
    return stem


def _underscored(config: XUTConfig) -> dict[str, str]:
    """Return the layer names of a network, keyed by the same names with underscores instead of dots."""
    with torch.device("meta"):
        network = XUT(config)
    names = [name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]
    return {name.replace(".", "_"): name for name in names}
