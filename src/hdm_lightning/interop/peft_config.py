"""The configuration that peft stores with an adapter's tensors: writing it for our layers, and reading it."""

import math
import re
from collections.abc import Mapping
from typing import Any

from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_layers import AdapterLayer, Kronecker, divisors
from hdm_lightning.interop.adapter_tensors import Scale
from hdm_lightning.interop.adapters import Adapter

KINDS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}
"""Kinds of adapters that can be read, by peft's names."""
_OTHER_FORMS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "alora_invocation_tokens", "arrow_config", "velora_config"),
)
"""Keys with which an adapter computes something other than scale · product in addition to each layer."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of peft initializations that take something out of the base's weights."""
AGAIN = "get it again, or write it with hdm-convert"
_NAME = re.compile(r"\^?(?:[\w.-]|\\[^\w\s])+")
"""A layer's name as a regular expression that matches nothing else; its dots may be escaped."""


def check_kind(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless an adapter is a plain LoRA, LoHa or LoKr on unchanged base weights; `where` names it."""
    kind, hint = config.get("peft_type"), "load it with peft itself: PeftModel.from_pretrained(network, folder)"
    other = [key for key in _OTHER_FORMS if config.get(key)]
    if not isinstance(kind, str) or kind not in KINDS or other or config.get("bias", "none") != "none":
        others = f" with {', '.join(other)}" if other else ""
        what = f"is a {kind!s:.40} adapter{others}; only plain LoRA, LoHa and LoKr can be read"
        raise UserError(what, where=where, hint=hint)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        what = f"was trained on changed base weights (init_lora_weights is {start!r:.20})"
        how = "save it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        raise UserError(what, where=where, hint=how)


def scales(config: Mapping[str, Any], where: str) -> Scale:
    """Return a function from a layer's name to its alpha over its rank, according to peft's configuration."""
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
        raise ValueError(f"{key} is {value!r:.40}, expected a number{'' if least < 0 else f' of at least {least:g}'}")
    return float(value)


def _by_layer(config: Mapping[str, Any], key: str, least: float = -math.inf) -> dict[str, float]:
    """Read values keyed by a layer's name or the end of it; with ^ in front, by the whole name only.

    peft allows regular expressions here. Those of a foreign file could take forever, so only names are read.
    """
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{key} is not an object")
    patterns = [pattern for pattern in found if not _NAME.fullmatch(pattern)]
    if patterns:
        raise ValueError(f"{key} has the pattern {patterns[0]!r:.60}; only layer names or ends of them can be read")
    return {re.sub(r"\\(.)", r"\1", name): _number(f"{key} of {name}", each, least) for name, each in found.items()}


def _of_layer(values: Mapping[str, float], name: str, other: float) -> float:
    """Return the value of the first key that matches, as peft does."""
    fitting = (value for key, value in values.items() if f"^{name}" == key or f".{name}".endswith(f".{key}"))
    return next(fitting, other)


def as_peft_has_it(adapter: Adapter) -> Adapter:
    """Return the adapter, converted to a LoRA if peft's configuration cannot describe it.

    It can describe neither layers of several kinds, nor LoKr layers whose factor sizes follow from no single number.
    """
    kinds = {layer.kind for layer in adapter.layers.values()}
    fits = len(kinds) == 1 and (kinds != {"LOKR"} or _decomposition(adapter) is not None)
    return adapter if fits else adapter.low_rank()


def peft_config(adapter: Adapter, prefix: str = "") -> dict[str, Any]:
    """Return peft's configuration of an adapter, for a network whose layer names have a prefix.

    The adapter must come from `as_peft_has_it`.
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
    """Return the rank from which peft derives a layer's factors: for full ones, at least half their size."""
    if not isinstance(layer, Kronecker) or len(layer.w1) + len(layer.w2) > 2:
        return layer.rank
    return -(-max(max(size) for size in layer.sizes) // 2)


def _decomposition(adapter: Adapter) -> dict[str, Any] | None:
    """Return decompose_factor and decompose_both that yield the factor sizes of all LoKr layers; None if none do."""
    layers = [layer for layer in adapter.layers.values() if isinstance(layer, Kronecker)]
    firsts = sorted({size for layer in layers for size in layer.sizes[0]}, reverse=True)
    for factor in (-1, *firsts):
        for both in (False, True):
            if all(_decomposed(layer, factor, both) for layer in layers):
                return {"decompose_factor": factor, "decompose_both": both}
    return None


def _decomposed(layer: Kronecker, factor: int, both: bool) -> bool:
    """Return whether peft's rule yields exactly a layer's factors."""
    rank, ((a, c), (b, d)) = _rank(layer), layer.sizes
    out, size = layer.shape
    if divisors(out, factor) != (a, b) or divisors(size, factor) != (c, d):
        return False
    pairs = (both and rank < max(a, c) / 2, rank < max(b, d) / 2)
    return pairs == (len(layer.w1) == 2, len(layer.w2) == 2)
