"""Tensors of adapters and their names in files: peft's, diffusers', ComfyUI's, kohya's, lycoris-lora's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.interop.low_rank_layer import AdapterLayer, LowRank
from hdm_lightning.interop.lycoris_layer import HADAMARD, KRONECKER, Hadamard, Kronecker, kronecker_parts
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
_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "alpha": "alpha",
    **{name: name for name in (*HADAMARD, *KRONECKER)},
}
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
    return {f"{prefix}{name}.{end}": value for name, layer in layers.items() for end, value in layer.tensors().items()}


def lycoris_tensors(layers: Mapping[str, AdapterLayer]) -> dict[str, Tensor]:
    """Return the tensors of layers under lycoris-lora's names, with an alpha for each layer."""
    found = {}
    for name, layer in layers.items():
        stem = LYCORIS + name.replace(".", "_")
        for end, tensor in layer.tensors().items():
            of_lora = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
            found[f"{stem}.{of_lora.get(end, end)}"] = tensor
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
    value = None if alpha is None else float(alpha)
    if set(own) == {"down", "up"}:
        return _low_rank(own["down"], own["up"], value, scale, shapes)
    if set(own) == set(HADAMARD):
        return _hadamard([own[key] for key in HADAMARD], value, scale, shapes)
    if own.keys() <= set(KRONECKER):
        return _kronecker(own, value, scale, shapes)
    raise ValueError(f"{shapes}, which are neither a LoRA (lora_A, lora_B) nor a LoHa or a LoKr")


def _low_rank(down: Tensor, up: Tensor, alpha: float | None, scale: float, shapes: str) -> LowRank:
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"{shapes}, expected (rank, in) and (out, rank)")
    return LowRank(down, up, down.shape[0] * scale if alpha is None else alpha)


def _hadamard(factors: list[Tensor], alpha: float | None, scale: float, shapes: str) -> Hadamard:
    w1_a, w1_b, w2_a, w2_b = factors
    (out, rank), size = w1_a.shape, w1_b.shape[1]
    if w1_b.shape[0] != rank or w2_a.shape != (out, w2_b.shape[0]) or w2_b.shape[1] != size:
        raise ValueError(f"{shapes}, expected two pairs of (out, rank) and (rank, in)")
    total = rank * scale if alpha is None else alpha
    return Hadamard(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, alpha=total)


def _kronecker(own: Mapping[str, Tensor], alpha: float | None, scale: float, shapes: str) -> Kronecker:
    try:
        w1, w2 = kronecker_parts(own)
    except ValueError as error:
        raise ValueError(f"{shapes}: {error}") from error
    inner = {part[0].shape[1] for part in (w1, w2) if len(part) == 2}
    if any(len(part) == 2 and part[0].shape[1] != part[1].shape[0] for part in (w1, w2)) or len(inner) > 1:
        raise ValueError(f"{shapes}, expected pairs of (size, rank) and (rank, size) with one rank")
    found = Kronecker(w1, w2, alpha=0.0)
    if alpha is not None and not inner:  # without a rank, lycoris-lora scales by 1, whatever alpha it writes
        alpha = 1.0
    return Kronecker(w1, w2, alpha=found.rank * scale if alpha is None else alpha)


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
