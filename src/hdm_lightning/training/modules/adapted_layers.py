"""The layers of a network that an adapter is added to, selected by names and patterns."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import nn

from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.interop.adapters import OWN_PARTS

_BLOCKS = r"(blocks_before|blocks_after|encoder|decoder)\.[\d.]+"
TARGETS: Mapping[str, str] = {
    "attention": _BLOCKS + r"\.(self|cross)_attention\.(qkv|query|key_value|output)",
    "feed_forward": _BLOCKS + r"\.feed_forward\.(input|output)",
    "text_projection": "text_projection",
    "modulation": r"modulation\..+\.(hidden|output)",
    "conditions": r"(time|aspect)_embedding\.(projection|input|output)",
    "patches": "patch_embedding|output_projection",
}
"""Names of groups of layers in an XUT, and the pattern of each group."""


class LayerAdapter(ABC):
    """Base class of adapters: adds small matrices to linear layers of a network and trains only those.

    Args:
        rank: rank of the matrices, at least 1.
        alpha: the adapter's output is scaled by alpha / rank; None means rank, so a scale of 1.
        targets: names in `TARGETS`, or regular expressions that match whole layer names.

    Raises:
        UserError: the rank is below 1.
    """

    def __init__(self, rank: int, alpha: float | None, targets: Sequence[str]) -> None:
        if rank < 1:
            raise UserError(f"{rank} is below 1", where="rank", hint="set 1 or more, or adapter=null for no adapter")
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)

    @abstractmethod
    def require_packages(self) -> None:
        """Raise UserError unless the packages it needs are installed."""

    @abstractmethod
    def parameters_beside(self, size: int, out: int) -> int:
        """Return the number of trained parameters added to a layer (out, size)."""

    def elements_beside(self, size: int, out: int) -> int:
        """Return the number of multiplications per token added to a layer (out, size)."""
        return self.parameters_beside(size, out)

    def layers(self, network: nn.Module) -> list[str]:
        """Return the names of the layers to adapt, in the network's order.

        Raises:
            UserError: the network is already adapted, there are no targets, or one matches no layer.
        """
        if is_adapted(network):
            raise UserError("the network already has an adapter", where="adapter", hint="merge it first")
        linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        found: set[str] = set()
        for target in self.targets:
            fitting = {name for name in linear if _pattern(target).fullmatch(name)}
            if not fitting:
                shown = did_you_mean(target, TARGETS)
                hint = f"{shown}; or use a regular expression that matches layers such as {', '.join(linear[:3])}"
                raise UserError(f"{target!r} matches no linear layer of the network", where="targets", hint=hint)
            found |= fitting
        if not found:
            raise UserError("is empty", where="targets", hint=f"choose some of {', '.join(TARGETS)}")
        return [name for name in linear if name in found]


def is_adapted(network: nn.Module) -> bool:
    """Return whether a network contains the layers of an adapter."""
    return any(part in name for name, _ in network.named_parameters() for part in OWN_PARTS)


def _pattern(target: str) -> re.Pattern[str]:
    try:
        return re.compile(TARGETS.get(target, target))
    except re.error as error:
        hint = f"choose some of {', '.join(TARGETS)}"
        raise UserError(f"{target!r} is not a valid pattern ({error})", where="targets", hint=hint) from error
