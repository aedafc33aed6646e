"""What an adapter adds to one layer's weight: the base of all kinds of adapters, and LoRA (arXiv 2106.09685).

Shapes: r rank, in and out the sizes of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor


class AdapterLayer(ABC):
    """What is added to one layer's weight: scale · product.

    Attributes:
        kind: kind of adapter, by peft's name.
        alpha: the scale is alpha / rank.
    """

    kind: ClassVar[str]
    alpha: float

    @property
    @abstractmethod
    def rank(self) -> int:
        """Divisor of alpha in the scale."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it is added to."""

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / self.rank

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the ends of their names in files."""

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return a copy with other tensors under these names."""

    @abstractmethod
    def product(self) -> Tensor:
        """Return the product (out, in) in float64."""

    @abstractmethod
    def folded(self) -> Self:
        """Return an equal layer with the scale folded into a tensor, so alpha equals the rank."""

    @abstractmethod
    def low_rank(self) -> LowRank:
        """Return an equal layer of two matrices, exact up to rounding."""

    def delta(self, weight: float = 1.0) -> Tensor:
        """Return weight · scale · product (out, in) in float64."""
        return weight * self.scale * self.product()

    def cast(self, dtype: torch.dtype) -> Self:
        """Return a copy with its tensors in another dtype."""
        return self.with_tensors({name: tensor.to(dtype) for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class LowRank(AdapterLayer):
    """LoRA: scale · up @ down.

    Args:
        down: (r, in), called lora_A or lora_down.
        up: (out, r), called lora_B or lora_up.
        alpha: the scale is alpha / r.
    """

    down: Tensor
    up: Tensor
    alpha: float

    kind = "LORA"

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it is added to."""
        return self.up.shape[0], self.down.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the ends of their names in files."""
        return {"lora_A.weight": self.down, "lora_B.weight": self.up}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LowRank:
        """Return a copy with other tensors under these names."""
        return LowRank(tensors["lora_A.weight"], tensors["lora_B.weight"], self.alpha)

    def product(self) -> Tensor:
        """Return the product (out, in) in float64."""
        return self.up.double() @ self.down.double()

    def folded(self) -> LowRank:
        """Return an equal layer with the scale folded into `up`."""
        return LowRank(self.down, self.up * self.scale, float(self.rank))

    def low_rank(self) -> LowRank:
        """Return the layer itself."""
        return self
