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
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hdm_lightning.encoders.pretrained import is_local_path
from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapters import Adapter, Base, LowRank
from hdm_lightning.interop.pipeline_folder import NETWORK_PREFIX, is_pipeline_folder
from hdm_lightning.interop.tensor_files import read_tensors, write_tensors
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import write_json, write_text

CONFIG, WEIGHTS, BASE, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json", "README.md"
_PEFT = "base_model.model."
PREFIXES = {"lora": f"transformer.{NETWORK_PREFIX}", "lora_comfyui": "diffusion_model."}
"""What stands before a layer's name in a single file, by the name of its layout."""
_ALL_PREFIXES = (_PEFT, *PREFIXES.values(), "transformer.", f"unet.{NETWORK_PREFIX}", "unet.", NETWORK_PREFIX)
_UNDERSCORED = ("lora_unet_", "lora_transformer_")
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

The base's licence and limits hold for what the two draw together, and the training pictures' licence may bind it, too.

```json
{training}
```
"""


def adapter_folder(path: Path) -> Path | None:
    """The folder of an adapter that a path means, a run's too; None where it means something else."""
    return next((folder for folder in (path / "final", path) if (folder / CONFIG).is_file()), None)


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter's folder, a run's that has trained one, or a single file with one."""
    if adapter_folder(path) is not None:
        return True
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    try:
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
    record = _metadata(path)
    layers = _layers(read_tensors(path), {}, str(path), config)
    return Adapter(layers, Base(**record.get("base", {})), record.get("settings", {}))


def _read_folder(folder: Path) -> Adapter:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, alphas = config["peft_type"], _alphas(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot be read ({error})", where=str(folder / CONFIG), hint="get the folder again") from error
    other = [key for key in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices") if config.get(key)]
    if kind != "LORA" or other or config.get("bias", "none") != "none":
        raise UserError(
            f"is a {kind} adapter{' with ' + ', '.join(other) if other else ''}; plain LoRA is read here",
            where=str(folder / CONFIG),
            hint="load it with peft itself: PeftModel.from_pretrained(network, folder)",
        )
    layers = _layers(read_tensors(folder / WEIGHTS), alphas, str(folder / WEIGHTS), None)
    record = _record(folder / BASE)
    base = Base(**record.get("base", {"name": config.get("base_model_name_or_path")}))
    return Adapter(layers, base, record.get("settings", {}))


def _record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        Base(**found["base"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path), hint="get the folder again") from error
    return found


def _alphas(config: Mapping[str, Any]) -> dict[str, float]:
    """Pattern of a layer's name → alpha over rank, as peft has it; the empty pattern is all others'."""
    root = bool(config.get("use_rslora"))
    ranks, alphas = dict(config.get("rank_pattern") or {}), dict(config.get("alpha_pattern") or {})
    known = {"": (float(config["r"]), float(config["lora_alpha"]))}
    for pattern in {*ranks, *alphas}:
        known[pattern] = (float(ranks.get(pattern, config["r"])), float(alphas.get(pattern, config["lora_alpha"])))
    return {pattern: alpha / (rank**0.5 if root else rank) for pattern, (rank, alpha) in known.items()}


def _scale(name: str, scales: Mapping[str, float]) -> float | None:
    for pattern, scale in scales.items():
        if pattern and re.match(rf"(.*\.)?({pattern})$", name):
            return scale
    return scales.get("")


def _layers(
    tensors: Mapping[str, Tensor], scales: Mapping[str, float], where: str, config: XUTConfig | None
) -> dict[str, LowRank]:
    """The layers of a file's tensors; those that say no alpha have the scale that fits their name, or 1."""
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
    return {name: _low_rank(found, _scale(name, scales)) for name, found in whole.items()}


def _low_rank(found: Mapping[str, Tensor], scale: float | None) -> LowRank:
    rank = found["down"].shape[0]
    alpha = float(found["alpha"]) if "alpha" in found else rank * (1.0 if scale is None else scale)
    return LowRank(found["down"], found["up"], alpha)


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


def _metadata(path: Path) -> dict[str, Any]:
    """What this project has left in a file; nothing in one of somebody else's."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get(_METADATA, "{}")
        found: dict[str, Any] = json.loads(written)
        Base(**found.get("base", {}))
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError):
        return {}  # whoever reads its tensors will say what is wrong
    return found
