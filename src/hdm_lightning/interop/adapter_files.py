"""Adapters on disk: read and write peft folders and single files, without running anything in them.

```
adapter_model.safetensors   base_model.model.LAYER.lora_A.weight, ….lora_B.weight
adapter_base.json           name and checksum of the base, training record, sampling settings
adapter_config.json         as peft writes it; written last, so a folder with one is complete
```
A single file has the same tensors with another prefix: `transformer.`, as in diffusers' documentation of
`load_lora_adapter`, or `diffusion_model.`, as ComfyUI expects of LoRAs for any diffusion model. Files with lora_down,
lora_up and alpha, and with underscores instead of dots in names (`lora_unet_…`, `lycoris_…`), can be read, too.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from hdm_lightning.encoders.pretrained import is_local_path
from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_tensors import (
    PEFT,
    PREFIXES,
    are_of_adapter,
    layers_of,
    lycoris_tensors,
    named_tensors,
)
from hdm_lightning.interop.adapters import Adapter, Base
from hdm_lightning.interop.peft_config import AGAIN, KINDS, as_peft_has_it, check_kind, peft_config, scales
from hdm_lightning.interop.pipeline_folder import is_pipeline_folder
from hdm_lightning.interop.tensor_files import read_tensors, safetensors_header, write_tensors
from hdm_lightning.json_files import parse_object, read_object
from hdm_lightning.models import XUTConfig
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import write_json, write_text

CONFIG, WEIGHTS, BASE, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json", "README.md"
_METADATA = "hdm_lightning_adapter"
_CARD_TEXT = """---
library_name: hdm-lightning
pipeline_tag: text-to-image
{base_model}tags: [hdm, xut, {tag}]
---

# {name}

A {kind} of `{base}`, trained with hdm-lightning: rank {rank}, {count} layers.

```
hdm-sample {base_word} "a prompt" --lora {folder_word}
```

```python
from hdm_lightning import HDMPipeline

pipeline = HDMPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("{folder}", adapter_name="mine")
pipeline.set_adapters(["mine"], [0.8])
```

The license and the limits of the base apply to images made with both; the license of the training images may, too.

```json
{training}
```
"""


def adapter_folder(path: Path) -> Path | None:
    """Return the adapter's folder for a path, which may be a run's folder; None if it is anything else."""
    return next((folder for folder in (path / "final", path) if (folder / CONFIG).is_file()), None)


def is_adapter(path: Path) -> bool:
    """Return whether a path is an adapter's folder, a run that trained one, or a single safetensors file with one.

    As in `read_tensors`, the first bytes decide what a file is, not its name.
    """
    return adapter_folder(path) is not None or are_of_adapter(safetensors_header(path)[1])


def read_adapter(path: Path, config: XUTConfig | None = None) -> Adapter:
    """Read an adapter from a peft folder, a run's folder, or a single .safetensors file.

    Args:
        path: folder or file.
        config: configuration of its network; only needed for names with underscores.

    Raises:
        UserError: there is none, it cannot be read, or its kind is not supported.
    """
    folder = adapter_folder(path)
    if folder is not None:
        return _read_folder(folder)
    if not path.exists():
        hint = "use the folder of a LoRA run, a peft folder or a .safetensors file"
        raise UserError("there is no such adapter", where=str(path), hint=hint)
    if path.is_dir():
        model = any(is_pipeline_folder(folder) for folder in (path / "final", path))
        kind = "pass it as MODEL, as it is a whole model" if model else f"use a folder with {CONFIG}, or a file"
        hint = f"{kind}; hdm-train experiment=lora makes a LoRA"
        raise UserError(f"contains no adapter ({CONFIG})", where=str(path), hint=hint)
    layers = layers_of(read_tensors(path), lambda _: 1.0, str(path), config)
    return Adapter(layers, *_metadata(path))


def _read_folder(folder: Path) -> Adapter:
    config, where = read_object(folder / CONFIG, hint=AGAIN), str(folder / CONFIG)
    check_kind(config, where)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise UserError(f"base_model_name_or_path is {base!r:.40}, expected a name", where=where, hint=AGAIN)
    layers = layers_of(read_tensors(folder / WEIGHTS), scales(config, where), str(folder / WEIGHTS))
    path = folder / BASE
    return Adapter(layers, *(_record(read_object(path, hint=AGAIN), str(path)) if path.is_file() else (Base(base),)))


def _metadata(path: Path) -> tuple[Base, Mapping[str, Any]]:
    """Read the record that this project leaves in a file; empty for files from elsewhere."""
    written = safetensors_header(path)[0].get(_METADATA)
    if written is None:
        return Base(), {}
    try:
        found = parse_object(written)
    except ValueError as error:
        what = f"has a record ({_METADATA}) that is not a JSON object ({error})"
        raise UserError(what, where=str(path), hint=AGAIN) from error
    return _record(found, str(path))


def _record(found: Mapping[str, Any], where: str) -> tuple[Base, Mapping[str, Any]]:
    """Return base and settings of a record; `where` names its file in errors."""
    base, settings = found.get("base"), found.get("settings", {})
    known = {each.name for each in fields(Base)}
    if not isinstance(base, dict) or base.keys() - known or not all(isinstance(x, str | None) for x in base.values()):
        what = f"does not describe its base by the strings {' and '.join(sorted(known))}"
        raise UserError(what, where=where, hint=AGAIN)
    parts = ("training", "sampling")
    if not isinstance(settings, dict) or not all(isinstance(settings.get(part, {}), dict) for part in parts):
        raise UserError(f"settings, and {' and '.join(parts)} in them, must be objects", where=where, hint=AGAIN)
    return Base(**base), settings


def write_adapter_folder(folder: Path, adapter: Adapter, *, name: str = "A LoRA", found_as: str | None = None) -> None:
    """Write a peft folder, adapter_config.json last; the card calls it `found_as`, or else by the folder's path.

    Layers that peft cannot describe are written as a LoRA; see `as_peft_has_it`.
    """
    adapter = as_peft_has_it(adapter)
    (folder / CONFIG).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS, named_tensors(adapter.layers, PEFT))
    write_json(folder / BASE, {"base": asdict(adapter.base), "settings": dict(adapter.settings)})
    ranks, base = [layer.rank for layer in adapter.layers.values()], adapter.base.name
    kind = KINDS[next(iter(adapter.layers.values())).kind]
    card = _CARD_TEXT.format(
        base=base or "BASE",
        base_word=shlex.quote(base or "BASE"),
        base_model=f"base_model: {base}\n" if base and is_on_hub(base) else "",
        name=name,
        kind=kind,
        tag=kind.lower(),
        rank=max(ranks),
        count=len(ranks),
        folder=found_as or folder,
        folder_word=shlex.quote(found_as or str(folder)),
        training=json.dumps(dict(adapter.settings.get("training", {})), indent=2, ensure_ascii=False),
    )
    write_text(folder / CARD, card)
    write_json(folder / CONFIG, peft_config(adapter))


def is_on_hub(base: str) -> bool:
    """Return whether a base's name is a hub name OWNER/NAME and not a folder."""
    return base.count("/") == 1 and not is_local_path(base) and not Path(base).exists()


def shown_name(name: str) -> str:
    """Return a model's name for others: a local path relative to the working directory, or just its last part."""
    if not (is_local_path(name) or Path(name).exists()):
        return name
    path, here = Path(name).expanduser().absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def for_others(adapter: Adapter) -> Adapter:
    """Return a copy whose base's name reveals nothing about this machine; its checksum stays."""
    base = adapter.base
    return adapter if base.name is None else replace(adapter, base=replace(base, name=shown_name(base.name)))


def write_adapter_file(path: Path, adapter: Adapter, layout: str) -> None:
    """Write one .safetensors file in a layout.

    "lora" (diffusers' names) and "lora_comfyui" are for readers that only know LoRAs: other kinds are written in their
    exact LoRA form, and the scale is folded into lora_B. "lycoris" has lycoris-lora's names, every layer in its own
    kind, with its alpha.
    """
    if layout == "lycoris":
        tensors = lycoris_tensors(adapter.layers)
    else:
        folded = {name: layer.low_rank().folded() for name, layer in adapter.layers.items()}
        tensors = named_tensors(folded, PREFIXES[layout])
    record = {"base": asdict(adapter.base), "settings": dict(adapter.settings)}
    write_tensors(path, tensors, {_METADATA: json.dumps(record)})


def describe_adapter(adapter: Adapter) -> str:
    """Describe an adapter, one fact per line."""
    layers = adapter.layers
    ranks = sorted({layer.rank for layer in layers.values()})
    kinds = sorted({KINDS[layer.kind] for layer in layers.values()})
    values = sum(tensor.numel() for layer in layers.values() for tensor in layer.tensors.values())
    lines = [
        f"base      {adapter.base.name or 'not recorded'}",
        f"checksum  {adapter.base.sha256 or 'not recorded'}",
        f"kind      {', '.join(kinds)}",
        f"rank      {', '.join(map(str, ranks))}; {len(layers)} layers, {values:,} values",
        *(f"  {name:40} {layer.shape[0]}x{layer.shape[1]}, scale {layer.scale:g}" for name, layer in layers.items()),
    ]
    return "\n".join(map(in_one_line, lines))
