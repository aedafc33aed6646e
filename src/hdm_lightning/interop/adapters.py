"""Adapters of an XUT as tensors: what they add to a network's layers, and which network they were made for."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_layers import AdapterLayer
from hdm_lightning.interop.tensor_files import require_finite
from hdm_lightning.printable import in_one_line

OWN_PARTS = (".lora_", ".hada_", ".lokr_")
"""Parts of the names of an adapter's own tensors once it is attached to a network."""
ANY_BASE = "--any-base (any_base=True in Python)"
_SHOWN = 3


@dataclass(frozen=True)
class Base:
    """The network that an adapter was trained on.

    Args:
        name: its folder or hub name, None if unknown.
        sha256: hash of its weights, see `weights_sha256`; None if unknown.
    """

    name: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA, LoHa or LoKr of an XUT, or layers of several of these kinds.

    Args:
        layers: the layer's name in an `XUT` → what is added to it.
        base: the network it is for.
        settings: plain values stored with it: `training`, `sampling`, `context_length`.
    """

    layers: Mapping[str, AdapterLayer]
    base: Base = field(default_factory=Base)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> Self:
        """Return a copy with its tensors in another dtype."""
        return replace(self, layers={name: layer.cast(dtype) for name, layer in self.layers.items()})

    def low_rank(self) -> Self:
        """Return the adapter as a LoRA, exact up to rounding."""
        return replace(self, layers={name: layer.low_rank() for name, layer in self.layers.items()})


def require_peft(where: str) -> None:
    """Raise UserError, naming `where` as what needs it, unless the package peft is installed."""
    if find_spec("peft") is None:
        raise UserError("needs the package peft", where=where, hint="pip install 'hdm-lightning[lora]'")


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a network as it was before adapters were attached to it."""
    return {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if not any(part in name for part in OWN_PARTS)
    }


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a network's tensors (names, shapes, float32 values), independent of file and layout."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().to("cpu", torch.float32).contiguous()
        total.update(f"{name}{tuple(value.shape)}".encode())
        total.update(value.numpy().data)
    return total.hexdigest()


def check_adapter(
    adapter: Adapter, state: Mapping[str, Tensor], *, where: str, sha256: str | None = None, any_base: bool = False
) -> None:
    """Raise UserError unless an adapter fits a network and was made for it.

    Args:
        state: the network's tensors by name.
        where: names the adapter in errors.
        sha256: hash of the network's weights; None computes it if needed.
        any_base: accept an adapter trained on other weights of the same shape.
    """
    own = f"use it with its own base, {adapter.base.name}" if adapter.base.name else "use it with its own base"
    missing = [name for name in adapter.layers if f"{name}.weight" not in state]
    if missing:
        what = f"was made for another network: this one has no layer {_listed(missing)}"
        raise UserError(what, where=where, hint=own)
    for name, layer in adapter.layers.items():
        found = tuple(state[f"{name}.weight"].shape)
        if found != layer.shape:
            sizes = ["x".join(map(str, shape)) for shape in (layer.shape, found)]
            what = f"was made for another network: {in_one_line(name)} is {sizes[0]} there, {sizes[1]} in this one"
            raise UserError(what, where=where, hint=own)
    if any_base or adapter.base.sha256 is None:
        return
    if adapter.base.sha256 != (sha256 or weights_sha256(state)):
        what = "was trained on another base: its layers fit this network, but the weights differ"
        hint = f"{own}, or accept results that differ from its training with {ANY_BASE}"
        raise UserError(what, where=where, hint=hint)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(in_one_line, names[:_SHOWN])) + more


def merged(state: Mapping[str, Tensor], adapters: Iterable[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """Return a network's tensors with adapters added, each times its weight; summed in float64, rounded once.

    The adapters must fit; see `check_adapter`. Raises UserError: a sum exceeds the range of the network's dtype.
    """
    result = dict(state)
    sums: dict[str, Tensor] = {}
    for adapter, weight in adapters:
        for name, layer in adapter.layers.items():
            key = f"{name}.weight"
            sums[key] = sums.get(key, state[key].double().cpu()) + layer.delta(weight).cpu()
    for key, value in sums.items():
        result[key] = value.to(state[key])
    try:
        require_finite({key: result[key] for key in sums})
    except ValueError as error:
        hint = "use a smaller weight, or a base in float32, which has a wider range than float16"
        raise UserError(str(error), where="the network with the LoRA merged in", hint=hint) from error
    return result
