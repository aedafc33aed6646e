"""Adapters on disk: peft's folder and single files, read and written; nothing in them is run.

```
adapter_model.safetensors   base_model.model.LAYER.lora_A.weight, ….lora_B.weight
adapter_base.json           name and checksum of the base, and how its training drew
adapter_config.json         as peft writes it; written last, so that a folder with one is whole
```
A single file has the same tensors with another prefix, as diffusers' documentation of `load_lora_adapter` has it
(`transformer.`), or as ComfyUI takes LoRAs of any diffusion model (`diffusion_model.`). Files with lora_down, lora_up
and alpha, and those whose names have underscores in place of dots (`lora_unet_…`), are read, too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hdm_lightning.encoders.pretrained import is_local_path
from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapters import Adapter, Base, LowRank
from hdm_lightning.interop.pipeline_folder import NETWORK_PREFIX, is_pipeline_folder
from hdm_lightning.interop.tensor_files import (
    is_safetensors,
    read_tensors,
    require_finite,
    safetensors_metadata,
    write_tensors,
)
from hdm_lightning.json_files import parse_object, read_object
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import write_json, write_text

CONFIG, WEIGHTS, BASE, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json", "README.md"
_PEFT = "base_model.model."
PREFIXES = {"lora": f"transformer.{NETWORK_PREFIX}", "lora_comfyui": "diffusion_model."}
"""What stands before a layer's name in a single file, by the name of its layout."""
_ALL_PREFIXES = (_PEFT, *PREFIXES.values(), "transformer.", f"unet.{NETWORK_PREFIX}", "unet.", NETWORK_PREFIX)
_UNDERSCORED = ("lora_unet_", "lora_transformer_")
_AGAIN = "get it again, or write it with hdm-convert"
_NAME = re.compile(r"\^?(?:[\w.-]|\\[^\w\s])+")
"""Of a layer, as a regular expression that means nothing else: its dots may be escaped."""
_METADATA = "hdm_lightning_adapter"
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
}
_CARD_TEXT = """---
library_name: hdm-lightning
pipeline_tag: text-to-image
{base_model}tags: [hdm, xut, lora]
---

# {name}

A LoRA of `{base}`, trained with hdm-lightning: rank {rank}, {count} layers.

```
hdm-sample {base} "a prompt" --lora {folder}
```

```python
from hdm_lightning import HDMPipeline

pipeline = HDMPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("{folder}", adapter_name="mine")
pipeline.set_adapters(["mine"], [0.8])
```

The base's license and limits hold for what the two draw together, and the training pictures' license may bind it, too.

```json
{training}
```
"""


def adapter_folder(path: Path) -> Path | None:
    """The folder of an adapter that a path means, a run's too; None where it means something else."""
    return next((folder for folder in (path / "final", path) if (folder / CONFIG).is_file()), None)


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter's folder, a run's that has trained one, or a single safetensors file with one.

    As in `read_tensors`, the first bytes say what a file is, not its name.
    """
    if adapter_folder(path) is not None:
        return True
    if not path.is_file():
        return False
    try:
        with path.open("rb") as begun:
            if not is_safetensors(begun.read(64)):
                return False
        with safe_open(path, "pt") as file:
            return any(_split(key)[1] in ("down", "up") for key in file.keys())  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError):
        return False


def read_adapter(path: Path, config: XUTConfig | None = None) -> Adapter:
    """An adapter from peft's folder, a run's folder, or a single .safetensors file.

    Args:
        path: where it is.
        config: of the network that it is for; needed for names with underscores alone.

    Raises:
        UserError: there is none, it cannot be read, or it is of a kind that only other software knows.
    """
    folder = adapter_folder(path)
    if folder is not None:
        return _read_folder(folder)
    if not path.exists():
        hint = "give the folder of a LoRA run, a peft folder or a .safetensors file"
        raise UserError("there is no such adapter", where=str(path), hint=hint)
    if path.is_dir():
        model = any(is_pipeline_folder(folder) for folder in (path / "final", path))
        kind = "that is a whole model, which is given as MODEL" if model else f"give a folder with {CONFIG}, or a file"
        hint = f"{kind}; a LoRA is what hdm-train experiment=lora makes"
        raise UserError(f"holds no adapter ({CONFIG})", where=str(path), hint=hint)
    layers = _layers(read_tensors(path), lambda _: 1.0, str(path), config)
    return Adapter(layers, *_metadata(path))


def _read_folder(folder: Path) -> Adapter:
    config, where = read_object(folder / CONFIG, hint=_AGAIN), str(folder / CONFIG)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    other = [key for key in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices") if config.get(key)]
    if kind != "LORA" or other or config.get("bias", "none") != "none":
        raise UserError(
            f"is a {kind} adapter{' with ' + ', '.join(other) if other else ''}; plain LoRA is read here",
            where=where,
            hint="load it with peft itself: PeftModel.from_pretrained(network, folder)",
        )
    if not isinstance(base, str | None):
        raise UserError(f"base_model_name_or_path is {base!r:.40}, no name", where=where, hint=_AGAIN)
    layers = _layers(read_tensors(folder / WEIGHTS), _scales(config, where), str(folder / WEIGHTS), None)
    path = folder / BASE
    return Adapter(layers, *(_record(read_object(path, hint=_AGAIN), str(path)) if path.is_file() else (Base(base),)))


def _metadata(path: Path) -> tuple[Base, Mapping[str, Any]]:
    """What this project has left in a file; nothing in one of somebody else's."""
    written = safetensors_metadata(path).get(_METADATA)
    if written is None:
        return Base(), {}
    try:
        found = parse_object(written)
    except ValueError as error:
        what = f"has a record ({_METADATA}) that is no JSON object ({error})"
        raise UserError(what, where=str(path), hint=_AGAIN) from error
    return _record(found, str(path))


def _record(found: Mapping[str, Any], where: str) -> tuple[Base, Mapping[str, Any]]:
    """Base and settings of a record; `where` names its file in errors."""
    base, settings = found.get("base"), found.get("settings", {})
    known = {each.name for each in fields(Base)}
    if not isinstance(base, dict) or base.keys() - known or not all(isinstance(x, str | None) for x in base.values()):
        what = f"does not say by {' and '.join(sorted(known))}, which are texts, what its base is"
        raise UserError(what, where=where, hint=_AGAIN)
    parts = ("training", "sampling")
    if not isinstance(settings, dict) or not all(isinstance(settings.get(part, {}), dict) for part in parts):
        raise UserError(f"settings, and {' and '.join(parts)} in them, are no objects", where=where, hint=_AGAIN)
    return Base(**base), settings


def _scales(config: Mapping[str, Any], where: str) -> Callable[[str], float]:
    """Function of a layer's name that gives its alpha over its rank, as peft's configuration has them."""
    try:
        rank, alpha = _number("r", config.get("r"), least=1), _number("lora_alpha", config.get("lora_alpha"))
        ranks, alphas = _by_layer(config, "rank_pattern", least=1), _by_layer(config, "alpha_pattern")
    except (ValueError, OverflowError) as error:
        raise UserError(str(error), where=where, hint=_AGAIN) from error
    power = 0.5 if config.get("use_rslora") else 1.0
    return lambda name: _of_layer(alphas, name, alpha) / _of_layer(ranks, name, rank) ** power


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


def _layers(
    tensors: Mapping[str, Tensor], scale: Callable[[str], float], where: str, config: XUTConfig | None
) -> dict[str, LowRank]:
    """The layers of a file's tensors; those that say no alpha have the scale that their name has."""
    parts: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    underscored = _underscored(config) if config is not None else {}
    for key, tensor in tensors.items():
        stem, part = _split(key)
        if part is None:
            unknown.append(key)
            continue
        parts.setdefault(_layer_name(stem, underscored), {})[part] = tensor
    whole = {name: found for name, found in parts.items() if {"down", "up"} <= set(found)}
    if unknown or len(whole) < len(parts) or not whole:
        odd = [*unknown, *(name for name in parts if name not in whole)]
        what = f"has tensors that are no plain LoRA of linear layers: {', '.join(odd[:3])}" if odd else "is empty"
        raise UserError(what, where=where, hint="give a LoRA of this kind of network, as hdm-convert writes it")
    try:
        require_finite(tensors)
        return {name: _low_rank(name, found, scale(name)) for name, found in whole.items()}
    except ValueError as error:
        raise UserError(str(error), where=where, hint="get it again, or an earlier one of its training") from error


def _low_rank(name: str, found: Mapping[str, Tensor], scale: float) -> LowRank:
    """What is added to a layer. Raises ValueError: its tensors are no two matrices of one rank and one number."""
    down, up, alpha = found["down"], found["up"], found.get("alpha")
    shapes = f"{name} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"
    if down.ndim != 2 or up.ndim != 2 or not down.shape[0] or down.shape[0] != up.shape[1]:
        raise ValueError(f"{shapes}, which are no (rank, in) and (out, rank)")
    if not down.is_floating_point() or not up.is_floating_point():
        raise ValueError(f"{shapes} of {down.dtype} and {up.dtype}, which are no floats")
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{name} has {alpha.numel()} values of alpha instead of one")
    return LowRank(down, up, down.shape[0] * scale if alpha is None else float(alpha))


def _split(key: str) -> tuple[str, str | None]:
    """The layer's part of a tensor's name, and which of the layer's tensors it is."""
    for ending, part in _PARTS.items():
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}"), part
    return key, None


def _layer_name(stem: str, underscored: Mapping[str, str]) -> str:
    for prefix in _UNDERSCORED:
        if stem.startswith(prefix):
            return underscored.get(stem.removeprefix(prefix), stem)
    for prefix in _ALL_PREFIXES:
        if stem.startswith(prefix):
            return stem.removeprefix(prefix)
    return stem


def _underscored(config: XUTConfig) -> dict[str, str]:
    """The layers of a network by their names with underscores in place of dots."""
    with torch.device("meta"):
        network = XUT(config)
    names = [name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]
    return {name.replace(".", "_"): name for name in names}


def write_adapter_folder(folder: Path, adapter: Adapter, *, name: str = "A LoRA", found_as: str | None = None) -> None:
    """Write peft's folder, adapter_config.json last; `found_as` is the card's name of it, else the folder's path."""
    (folder / CONFIG).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS, named_tensors(adapter.layers, _PEFT))
    write_json(folder / BASE, {"base": asdict(adapter.base), "settings": dict(adapter.settings)})
    ranks, base = [layer.rank for layer in adapter.layers.values()], adapter.base.name
    card = _CARD_TEXT.format(
        base=base or "BASE",
        base_model=f"base_model: {base}\n" if base and is_on_hub(base) else "",
        name=name,
        rank=max(ranks),
        count=len(ranks),
        folder=found_as or folder,
        training=json.dumps(dict(adapter.settings.get("training", {})), indent=2, ensure_ascii=False),
    )
    write_text(folder / CARD, card)
    write_json(folder / CONFIG, peft_config(adapter))


def is_on_hub(base: str) -> bool:
    """Whether a base's name is a hub's OWNER/NAME, and no folder's."""
    return base.count("/") == 1 and not is_local_path(base) and not Path(base).exists()


def peft_config(adapter: Adapter, prefix: str = "") -> dict[str, Any]:
    """An adapter as peft's `LoraConfig` describes it, for a network whose layers have `prefix` before their names."""
    first = next(iter(adapter.layers.values()))
    others = {name: layer for name, layer in adapter.layers.items() if layer.rank != first.rank}
    alphas = {name: layer for name, layer in adapter.layers.items() if layer.alpha != first.alpha}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base.name,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "target_modules": "|".join(re.escape(prefix + name) for name in adapter.layers),
        "rank_pattern": {re.escape(prefix + name): layer.rank for name, layer in others.items()},
        "alpha_pattern": {re.escape(prefix + name): layer.alpha for name, layer in alphas.items()},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _write_single(path: Path, adapter: Adapter, layout: str) -> None:
    folded = {name: layer.folded() for name, layer in adapter.layers.items()}
    record = {"base": asdict(adapter.base), "settings": dict(adapter.settings)}
    write_tensors(path, named_tensors(folded, PREFIXES[layout]), {_METADATA: json.dumps(record)})


def write_lora(path: Path, adapter: Adapter) -> None:
    """Write one .safetensors file under diffusers' names, its scale inside lora_B."""
    _write_single(path, adapter, "lora")


def write_lora_comfyui(path: Path, adapter: Adapter) -> None:
    """Write one .safetensors file under the names of ComfyUI's diffusion model, its scale inside lora_B."""
    _write_single(path, adapter, "lora_comfyui")


def named_tensors(layers: Mapping[str, LowRank], prefix: str) -> dict[str, Tensor]:
    """The tensors of layers under peft's names, with something before them."""
    pairs: Iterable[tuple[str, LowRank]] = layers.items()
    down = {f"{prefix}{name}.lora_A.weight": layer.down for name, layer in pairs}
    return down | {f"{prefix}{name}.lora_B.weight": layer.up for name, layer in layers.items()}


def describe_adapter(adapter: Adapter) -> str:
    """What an adapter holds, one fact a line."""
    layers = adapter.layers
    ranks = sorted({layer.rank for layer in layers.values()})
    values = sum(layer.down.numel() + layer.up.numel() for layer in layers.values())
    lines = [
        f"base      {adapter.base.name or 'not recorded'}",
        f"checksum  {adapter.base.sha256 or 'not recorded'}",
        f"rank      {', '.join(map(str, ranks))}; {len(layers)} layers, {values:,} values",
        *(f"  {name:40} {layer.shape[0]}x{layer.shape[1]}, scale {layer.scale:g}" for name, layer in layers.items()),
    ]
    return "\n".join(map(in_one_line, lines))
