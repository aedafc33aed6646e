"""Adapters of a pipeline's network, LoRA, LoHa or LoKr, several at once with a weight each, as in diffusers."""

import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin

from hdm_lightning.encoders.pretrained import is_local_path, locate_model
from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_files import CONFIG, adapter_folder, read_adapter
from hdm_lightning.interop.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from hdm_lightning.interop.adapter_tensors import PREFIXES, named_tensors
from hdm_lightning.interop.adapters import Adapter, base_state, check_adapter, require_peft
from hdm_lightning.interop.peft_config import peft_config

DOWNLOAD = ["*.json", "*.safetensors"]
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf(inity)?)", re.IGNORECASE)


@dataclass(frozen=True)
class AdapterUse:
    """An adapter to draw with.

    Args:
        name: folder, file or hub name.
        weight: how much of it; 0 is none, 1 as it was trained.
    """

    name: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "AdapterUse":
        """What NAME or NAME:WEIGHT means; a path that is there is a name, whatever colons are in it.

        Raises UserError: there is no name, or the weight is no number that a float holds.
        """
        name, colon, weight = text.rpartition(":")
        found, hint = cls(text), "give NAME or NAME:WEIGHT, runs/mine:0.7"
        if colon and _NUMBER.fullmatch(weight) and not Path(text).exists():
            found = cls(name, float(weight))
        if not found.name:
            raise UserError(f"{text!r} names no adapter", where="--lora", hint=hint)
        if not math.isfinite(found.weight):
            raise UserError(f"{weight} is no weight to draw with", where="--lora", hint=hint)
        return found


def find_adapter(name: str, *, where: str = "--lora", weight_name: str | None = None) -> Path:
    """The folder or file of an adapter: a path, or a hub name, of which it is downloaded once.

    Raises:
        UserError: there is none.
    """
    path = Path(name).expanduser()
    if not path.exists() and "/" in name and not is_local_path(name):
        required = [weight_name or f"{CONFIG}|*.safetensors"]
        path = locate_model(name, where=where, required=required, download=DOWNLOAD)
    if weight_name:
        return path / weight_name
    if path.is_dir() and adapter_folder(path) is None:
        files = sorted(path.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
    return path


def adapter_files(path: Path) -> tuple[Path, ...]:
    """The files that hold an adapter's weights."""
    folder = adapter_folder(path)
    return (path,) if folder is None else (folder / ADAPTER_WEIGHTS,)


class AdapterLoading(LoraBaseMixin):
    """What diffusers' pipelines with LoRAs can do: `set_adapters`, `fuse_lora`, `unload_lora_weights`, …

    Needs the package peft.
    """

    _lora_loadable_modules = ["transformer"]  # noqa: RUF012  (as diffusers declares it)
    transformer: Any

    def load_lora_weights(  # type: ignore[override]
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Adapter,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        any_base: bool = False,
        **options: Any,
    ) -> None:
        """Load an adapter beside those that are there, and draw with it alone until `set_adapters` says otherwise.

        Args:
            pretrained_model_name_or_path_or_dict: a LoRA run, a peft folder, a .safetensors file, a hub name; or an
                adapter that has been read.
            adapter_name: for `set_adapters`; None takes that of the folder or the file.
            weight_name: the file in a folder or in a repository of the hub.
            any_base: take one that was trained on other weights of this shape. The weights are compared where the
                pipeline has them in float32.
            options: of `load_lora_adapter` of diffusers' models.

        Raises:
            UserError: there is no such adapter, it was made for another network or base, its name is taken, or peft is
                missing.
        """
        require_peft("load_lora_weights")
        source, where = pretrained_model_name_or_path_or_dict, "load_lora_weights"
        config = self.transformer.network.config
        if not isinstance(source, Adapter):
            path = find_adapter(os.fspath(source), where=where, weight_name=weight_name)
            where, adapter_name = str(path), adapter_name or _name_of(path)
            source = read_adapter(path, config)
        name = re.sub(r"\W+", "_", adapter_name or "adapter")
        if name in getattr(self.transformer, "peft_config", {}):
            hint = "give another adapter_name, or delete_adapters first"
            raise UserError(f"there is an adapter {name!r} already", where=where, hint=hint)
        state = base_state(self.transformer.network.state_dict())
        exact = next(iter(self.transformer.parameters())).dtype == torch.float32
        check_adapter(source, state, where=where, any_base=any_base or not exact)
        source, prefix = source.low_rank(), "transformer"
        metadata = {f"{prefix}.{key}": value for key, value in peft_config(source, "network.").items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
            self.transformer.load_lora_adapter(
                named_tensors(source.layers, PREFIXES["lora"]),
                prefix=prefix,
                adapter_name=name,
                metadata=metadata,
                _pipeline=self,
                **options,
            )

    def use_adapters(self, uses: Sequence[AdapterUse], *, any_base: bool = False) -> None:
        """Load adapters and draw with all of them, each by its weight, beside those that are there already."""
        active = self.get_active_adapters() if self.has_adapters else []
        weights = [1.0] * len(active)
        for number, use in enumerate(uses):
            name = f"{number}_{re.sub(r'[^A-Za-z0-9]+', '_', use.name)}"
            self.load_lora_weights(find_adapter(use.name), name, any_base=any_base)
            active, weights = [*active, name], [*weights, use.weight]
        if uses:
            self.set_adapters(active, weights)

    @property
    def has_adapters(self) -> bool:
        """Whether adapters have been loaded and not unloaded."""
        return bool(getattr(self.transformer, "peft_config", None))

    def require_no_adapters(self, what: str) -> None:
        """Raise UserError where adapters stand beside the network's own weights."""
        if self.has_adapters:
            hint = "unload_lora_weights() leaves the base; fuse_lora() and then unload_lora_weights() keeps them in it"
            raise UserError("the network has adapters beside its weights", where=what, hint=hint)


def _name_of(path: Path) -> str:
    """A run's name for its adapter, else that of the folder or of the file."""
    return path.parent.name if path.name == "final" else path.stem
