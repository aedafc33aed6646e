"""What peft writes beside an adapter's tensors: how it describes our layers, and what of it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_tensors import Scale
from hdm_lightning.interop.adapters import Adapter
from hdm_lightning.interop.low_rank_layer import AdapterLayer
from hdm_lightning.interop.lycoris_layer import Kronecker, divisors

KINDS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}
"""Adapters that are read, by peft's names of them."""
_OTHER_FORMS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "alora_invocation_tokens", "arrow_config", "velora_config"),
)
"""Keys by which an adapter computes something else than scale · product beside each layer."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of what peft initialises by taking something out of the base's weights."""
AGAIN = "get it again, or write it with hdm-convert"
_NAME = re.compile(r"\^?(?:[\w.-]|\\[^\w\s])+")
"""Of a layer, as a regular expression that means nothing else: its dots may be escaped."""


def check_kind(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless an adapter is a plain LoRA, LoHa or LoKr beside unchanged weights; `where` names it."""
    kind, hint = config.get("peft_type"), "load it with peft itself: PeftModel.from_pretrained(network, folder)"
    other = [key for key in _OTHER_FORMS if config.get(key)]
    if not isinstance(kind, str) or kind not in KINDS or other or config.get("bias", "none") != "none":
        others = f" with {', '.join(other)}" if other else ""
        what = f"is a {kind!s:.40} adapter{others}; plain LoRA, LoHa and LoKr are read"
        raise UserError(what, where=where, hint=hint)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        what = f"stands beside other weights than its base's (init_lora_weights is {start!r:.20})"
        how = "save it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        raise UserError(what, where=where, hint=how)


def scales(config: Mapping[str, Any], where: str) -> Scale:
    """Function of a layer's name that gives its alpha over its rank, as peft's configuration has them."""
    name = "lora_alpha" if config.get("peft_type") == "LORA" else "alpha"
    try:
        rank, alpha = _number("r", config.get("r"), least=1), _number(name, config.get(name))
        ranks, alphas = _by_layer(config, "rank_pattern", least=1), _by_layer(config, "alpha_pattern")
    except (ValueError, OverflowError) as error:
        raise UserError(str(error), where=where, hint=AGAIN) from error
    power = 0.5 if config.get("use_rslora") else 1.0
    return lambda layer: _of_layer(alphas, layer, alpha) / _of_layer(ranks, layer, rank) ** power


def _number(key: str, value: Any, least: float = -math.inf) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < least:
        raise ValueError(f"{key} is {value!r:.40}, no number{'' if least < 0 else f' from {least:g}'}")
    return float(value)


def _by_layer(config: Mapping[str, Any], key: str, least: float = -math.inf) -> dict[str, float]:
    """Values by a layer's name or by how it ends; with ^ before it, by the whole name alone.

    peft has regular expressions there. Those of a foreign file could take for ever, so names are all that is read.
    """
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{key} is no object")
    patterns = [pattern for pattern in found if not _NAME.fullmatch(pattern)]
    if patterns:
        raise ValueError(f"{key} has the pattern {patterns[0]!r:.60}; names of layers are read, and how they end")
    return {re.sub(r"\\(.)", r"\1", name): _number(f"{key} of {name}", each, least) for name, each in found.items()}


def _of_layer(values: Mapping[str, float], name: str, other: float) -> float:
    """The value of the first key that fits, as peft chooses it."""
    fitting = (value for key, value in values.items() if f"^{name}" == key or f".{name}".endswith(f".{key}"))
    return next(fitting, other)


def as_peft_has_it(adapter: Adapter) -> Adapter:
    """The adapter itself, or as a LoRA where peft's configuration has no place for it.

    It has none for layers of several kinds, nor for LoKr's whose factors' sizes follow from no single number.
    """
    kinds = {layer.kind for layer in adapter.layers.values()}
    fits = len(kinds) == 1 and (kinds != {"LOKR"} or _decomposition(adapter) is not None)
    return adapter if fits else adapter.low_rank()


def peft_config(adapter: Adapter, prefix: str = "") -> dict[str, Any]:
    """An adapter as peft describes it, for a network whose layers have `prefix` before their names.

    The adapter must be as `as_peft_has_it` gives it.
    """
    first = next(iter(adapter.layers.values()))
    ranks = {prefix + name: _rank(layer) for name, layer in adapter.layers.items()}
    alphas = {prefix + name: layer.scale * _rank(layer) for name, layer in adapter.layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    common = {
        "peft_type": first.kind,
        "task_type": None,
        "base_model_name_or_path": adapter.base.name,
        "inference_mode": True,
        "r": rank,
        "target_modules": "|".join(map(re.escape, ranks)),
        "rank_pattern": {re.escape(name): each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {re.escape(name): each for name, each in alphas.items() if each != alpha},
        "modules_to_save": None,
    }
    if first.kind != "LORA":
        drops = {"alpha": alpha, "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False}
        return common | drops | (_decomposition(adapter) or {} if first.kind == "LOKR" else {})
    plain = {"lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False}
    return common | plain | {"fan_in_fan_out": False}


def _rank(layer: AdapterLayer) -> int:
    """The rank that gives peft a layer's factors: of whole ones it is at least half their size."""
    if not isinstance(layer, Kronecker) or len(layer.w1) + len(layer.w2) > 2:
        return layer.rank
    return -(-max(max(size) for size in layer.sizes) // 2)


def _decomposition(adapter: Adapter) -> dict[str, Any] | None:
    """decompose_factor and decompose_both that give every layer of a LoKr its factors' sizes; None where none do."""
    layers = [layer for layer in adapter.layers.values() if isinstance(layer, Kronecker)]
    firsts = sorted({size for layer in layers for size in layer.sizes[0]}, reverse=True)
    for factor in (-1, *firsts):
        for both in (False, True):
            if all(_decomposed(layer, factor, both) for layer in layers):
                return {"decompose_factor": factor, "decompose_both": both}
    return None


def _decomposed(layer: Kronecker, factor: int, both: bool) -> bool:
    """Whether peft's rule gives a layer its very factors."""
    rank, ((a, c), (b, d)) = _rank(layer), layer.sizes
    out, size = layer.shape
    if divisors(out, factor) != (a, b) or divisors(size, factor) != (c, d):
        return False
    pairs = (both and rank < max(a, c) / 2, rank < max(b, d) / 2)
    return pairs == (len(layer.w1) == 2, len(layer.w2) == 2)
