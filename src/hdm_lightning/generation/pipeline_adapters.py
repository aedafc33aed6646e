"""LoRA, LoHa and LoKr adapters of a pipeline's network, several at once with a weight each, as in diffusers."""

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

from hdm_lightning.encoders.pretrained import FINAL, is_local_path, locate_model
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
    """An adapter and its weight.

    Args:
        name: folder, file or hub name.
        weight: strength; 0 turns it off, 1 is as trained.
    """

    name: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "AdapterUse":
        """Parse NAME or NAME:WEIGHT; a path that exists is a name, even with colons in it.

        Raises UserError: the name is empty, or the weight is not finite.
        """
        name, colon, weight = text.rpartition(":")
        found, hint = cls(text), "use NAME or NAME:WEIGHT, as in runs/mine:0.7"
        if colon and _NUMBER.fullmatch(weight) and not Path(text).exists():
            found = cls(name, float(weight))
        if not found.name:
            raise UserError(f"{text!r} does not name an adapter", where="--lora", hint=hint)
        if not math.isfinite(found.weight):
            raise UserError(f"{weight} is not a finite weight", where="--lora", hint=hint)
        return found


def find_adapter(name: str, *, where: str = "--lora", weight_name: str | None = None) -> Path:
    """Return the folder or file of an adapter from its path or its hub name, which is downloaded once.

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
    """Return the files with an adapter's weights."""
    folder = adapter_folder(path)
    return (path,) if folder is None else (folder / ADAPTER_WEIGHTS,)


class AdapterLoading(LoraBaseMixin):
    """The LoRA methods of diffusers pipelines: `set_adapters`, `fuse_lora`, `unload_lora_weights`, …

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
        """Load an adapter in addition to those loaded already; it alone is active until `set_adapters` is called.

        Args:
            pretrained_model_name_or_path_or_dict: a LoRA run, a peft folder, a .safetensors file, a hub name; or an
                adapter that has been read.
            adapter_name: name for `set_adapters`; None uses the name of the folder or file.
            weight_name: the file to load from a folder or hub repository.
            any_base: accept an adapter trained on other weights of the same shape. Base weights are compared only if
                the pipeline is in float32.
            options: those of `load_lora_adapter` of diffusers models.

        Raises:
            UserError: there is no such adapter, it was made for another network or base, its name is taken, or peft is
                missing.
        """
        require_peft("load_lora_weights")
        source, where = pretrained_model_name_or_path_or_dict, "load_lora_weights"
        config = self.transformer.network.config
        if not isinstance(source, Adapter):
            path = find_adapter(os.fspath(source), where=where, weight_name=weight_name)
            # The name of the run if it is one, else that of the folder or file.
            where, adapter_name = str(path), adapter_name or (path.parent.name if path.name == FINAL else path.stem)
            source = read_adapter(path, config)
        name = re.sub(r"\W+", "_", adapter_name or "adapter")
        if name in getattr(self.transformer, "peft_config", {}):
            hint = "pass another adapter_name, or call delete_adapters first"
            raise UserError(f"an adapter {name!r} is loaded already", where=where, hint=hint)
        state = base_state(self.transformer.network.state_dict())
        exact = next(iter(self.transformer.parameters())).dtype == torch.float32
        check_adapter(source, state, where=where, any_base=any_base or not exact)
        source, prefix = source.low_rank(), "transformer"
        metadata = {f"{prefix}.{key}": value for key, value in peft_config(source, "network.").items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are intended
            self.transformer.load_lora_adapter(
                named_tensors(source.layers, PREFIXES["lora"]),
                prefix=prefix,
                adapter_name=name,
                metadata=metadata,
                _pipeline=self,
                **options,
            )

    def use_adapters(self, uses: Sequence[AdapterUse], *, any_base: bool = False) -> None:
        """Load adapters and activate all of them with their weights, in addition to those active already."""
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
        """Whether adapters are loaded."""
        return bool(getattr(self.transformer, "peft_config", None))

    def require_no_adapters(self, what: str) -> None:
        """Raise UserError if adapters are loaded."""
        if self.has_adapters:
            hint = "call unload_lora_weights() to drop them, after fuse_lora() if the weights are to include them"
            raise UserError("the network has adapters loaded", where=what, hint=hint)
