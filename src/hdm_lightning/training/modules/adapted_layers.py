"""Which layers of a network an adapter stands beside: words and patterns for them."""

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
"""Words for the layers of an XUT, by their names."""


class LayerAdapter(ABC):
    """What puts something small beside linear layers of a network, which alone is trained.

    Args:
        rank: of the matrices, at least 1.
        alpha: what they add is scaled by alpha / rank; None is the rank, so that the scale is 1.
        targets: words of `TARGETS`, or patterns (regular expressions) of whole layer names.

    Raises:
        UserError: the rank is below 1.
    """

    def __init__(self, rank: int, alpha: float | None, targets: Sequence[str]) -> None:
        if rank < 1:
            raise UserError(f"{rank} is no rank", where="rank", hint="give 1 or more; without an adapter, adapter=null")
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)

    @abstractmethod
    def require_packages(self) -> None:
        """Raise UserError unless the packages are there that it needs."""

    @abstractmethod
    def parameters_beside(self, size: int, out: int) -> int:
        """How many numbers are trained beside a layer (out, size)."""

    @abstractmethod
    def elements_beside(self, size: int, out: int) -> int:
        """Elements of the matrices that a token is multiplied with beside a layer (out, size)."""

    def layers(self, network: nn.Module) -> list[str]:
        """Names of the layers that are adapted, in the network's order.

        Raises:
            UserError: the network is adapted already, or no layer fits a target.
        """
        if is_adapted(network):
            raise UserError("the network has an adapter already", where="adapter", hint="merge it first")
        linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        found: set[str] = set()
        for target in self.targets:
            fitting = {name for name in linear if _pattern(target).fullmatch(name)}
            if not fitting:
                shown = did_you_mean(target, TARGETS)
                hint = f"{shown}; or a regular expression of layers such as {', '.join(linear[:3])}"
                raise UserError(f"no linear layer of the network is named {target!r}", where="targets", hint=hint)
            found |= fitting
        if not found:
            raise UserError("there are none", where="targets", hint=f"name some of {', '.join(TARGETS)}")
        return [name for name in linear if name in found]


def is_adapted(network: nn.Module) -> bool:
    """Whether a network has the layers of an adapter."""
    return any(part in name for name, _ in network.named_parameters() for part in OWN_PARTS)


def _pattern(target: str) -> re.Pattern[str]:
    try:
        return re.compile(TARGETS.get(target, target))
    except re.error as error:
        hint = f"choose some of {', '.join(TARGETS)}"
        raise UserError(f"{target!r} is no pattern ({error})", where="targets", hint=hint) from error
