"""What an adapter adds to one layer's weight: LoRA (arXiv 2106.09685), and LoHa and LoKr of LyCORIS (arXiv 2309.14859).

LoHa and LoKr compose matrices of fewer numbers. Both have an exact form of two matrices, so programs that only know
LoRAs can use them: a LoHa of rank r becomes a LoRA of rank r², a LoKr one whose rank is the product of its factors'
ranks.

Shapes: r rank, in = c·d and out = a·b the sizes of a layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

LORA = ("lora_A.weight", "lora_B.weight")
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_SCALED = ("lora_B.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")
"""The tensor of each kind that takes the scale when it is folded in."""


@dataclass(frozen=True)
class AdapterLayer(ABC):
    """What is added to one layer's weight: scale · product.

    Attributes:
        kind: kind of adapter, by peft's name.
        tensors: by the ends of their names in files.
        alpha: the scale is alpha / rank.
    """

    kind: ClassVar[str]
    tensors: Mapping[str, Tensor]
    alpha: float

    @property
    @abstractmethod
    def rank(self) -> int:
        """Divisor of alpha in the scale."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it is added to."""

    @abstractmethod
    def product(self) -> Tensor:
        """Return the product (out, in) in float64."""

    @abstractmethod
    def low_rank(self) -> LowRank:
        """Return an equal layer of two matrices, exact up to rounding."""

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / self.rank

    def delta(self, weight: float = 1.0) -> Tensor:
        """Return weight · scale · product (out, in) in float64."""
        return weight * self.scale * self.product()

    def cast(self, dtype: torch.dtype) -> Self:
        """Return a copy with its tensors in another dtype."""
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    def folded(self) -> Self:
        """Return an equal layer with the scale folded into a tensor, so alpha equals the rank."""
        name = next(name for name in _SCALED if name in self.tensors)
        tensors = {**self.tensors, name: self.tensors[name] * self.scale}
        return replace(self, tensors=tensors, alpha=float(self.rank))


class LowRank(AdapterLayer):
    """LoRA: scale · up @ down, with down (r, in), called lora_A or lora_down, and up (out, r), lora_B or lora_up."""

    kind = "LORA"

    @classmethod
    def of(cls, down: Tensor, up: Tensor, alpha: float) -> Self:
        """Return the layer of two matrices."""
        return cls(dict(zip(LORA, (down, up), strict=True)), alpha)

    @property
    def down(self) -> Tensor:
        """(r, in)."""
        return self.tensors[LORA[0]]

    @property
    def up(self) -> Tensor:
        """(out, r)."""
        return self.tensors[LORA[1]]

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it is added to."""
        return self.up.shape[0], self.down.shape[1]

    def product(self) -> Tensor:
        """Return the product (out, in) in float64."""
        return self.up.double() @ self.down.double()

    def low_rank(self) -> LowRank:
        """Return the layer itself."""
        return self


class Hadamard(AdapterLayer):
    """LoHa: scale · (w1_a @ w1_b) ∘ (w2_a @ w2_b), element by element; w1_a, w2_a (out, r) and w1_b, w2_b (r, in)."""

    kind = "LOHA"

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """w1_a, w1_b, w2_a, w2_b."""
        return tuple(self.tensors[name] for name in HADAMARD)

    @property
    def rank(self) -> int:
        """r."""
        return self.factors[1].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it is added to."""
        return self.factors[0].shape[0], self.factors[1].shape[1]

    def product(self) -> Tensor:
        """Return the product (out, in) in float64."""
        w1_a, w1_b, w2_a, w2_b = (factor.double() for factor in self.factors)
        return (w1_a @ w1_b) * (w2_a @ w2_b)

    def low_rank(self) -> LowRank:
        """Return an equal LoRA of rank r², or of its full product if that is smaller."""
        if self.rank**2 >= min(self.shape):
            return _dense(self.product(), self.scale, self.factors[0].dtype)
        down, up = hadamard_pair(*self.factors)
        return LowRank.of(down, up, self.scale * down.shape[0])


class Kronecker(AdapterLayer):
    """LoKr: scale · w1 ⊗ w2, either of which may be a product of two matrices; r is 1 if neither is."""

    kind = "LOKR"

    @property
    def w1(self) -> tuple[Tensor, ...]:
        """(a, c), or the pair (a, r), (r, c)."""
        return kronecker_parts(self.tensors)[0]

    @property
    def w2(self) -> tuple[Tensor, ...]:
        """(b, d), or the pair (b, r), (r, d)."""
        return kronecker_parts(self.tensors)[1]

    @property
    def rank(self) -> int:
        """r, or 1 if neither factor is a pair."""
        return next((part[1].shape[0] for part in (self.w1, self.w2) if len(part) == 2), 1)

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(a, c) and (b, d)."""
        return (self.w1[0].shape[0], self.w1[-1].shape[1]), (self.w2[0].shape[0], self.w2[-1].shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it is added to."""
        (a, c), (b, d) = self.sizes
        return a * b, c * d

    def product(self) -> Tensor:
        """Return the product (out, in) in float64."""
        w1, w2 = ([factor.double() for factor in part] for part in (self.w1, self.w2))
        return torch.kron(*(part[0] @ part[1] if len(part) == 2 else part[0] for part in (w1, w2)))

    def low_rank(self) -> LowRank:
        """Return an equal LoRA, of `kronecker_rank` or of its full product if that is smaller."""
        if kronecker_rank(self.w1, self.w2) >= min(self.shape):
            return _dense(self.product(), self.scale, self.w1[0].dtype)
        down, up = kronecker_pair(self.w1, self.w2)
        return LowRank.of(down, up, self.scale * down.shape[0])


def hadamard_pair(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return down (r², in) and up (out, r²) whose product up @ down is (w1_a @ w1_b) ∘ (w2_a @ w2_b)."""
    down = (w1_b.unsqueeze(1) * w2_b.unsqueeze(0)).flatten(0, 1)
    return down, (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1)


def kronecker_rank(w1: tuple[Tensor, ...], w2: tuple[Tensor, ...]) -> int:
    """Return the rank of the two matrices of `kronecker_pair`."""
    one, other = (part[1].shape[0] if len(part) == 2 else min(part[0].shape) for part in (w1, w2))
    return one * other


def kronecker_pair(w1: tuple[Tensor, ...], w2: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return down (R, in) and up (out, R) whose product up @ down is w1 ⊗ w2, for R = `kronecker_rank`.

    (A₁B₁) ⊗ (A₂B₂) = (A₁ ⊗ A₂)(B₁ ⊗ B₂); a single factor is paired with the identity.
    """
    (up1, down1), (up2, down2) = _pair_of(w1), _pair_of(w2)
    return torch.kron(down1, down2), torch.kron(up1, up2)


def kronecker_parts(tensors: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return both factors from a layer's named tensors. Raises ValueError: one is missing or there twice."""
    parts = []
    for name in ("lokr_w1", "lokr_w2"):
        pair = tuple(tensors[key] for key in (f"{name}_a", f"{name}_b") if key in tensors)
        if (name in tensors) == bool(pair) or len(pair) == 1:
            raise ValueError(f"expected either {name} or {name}_a and {name}_b")
        parts.append(pair or (tensors[name],))
    return parts[0], parts[1]


def divisors(size: int, most: int) -> tuple[int, int]:
    """Return two numbers whose product is `size`, the smaller first: `most` if it divides the size, else less.

    With -1, the two are as close to each other as possible.
    """
    if most > 0 and size % most == 0:
        smaller = most
    else:
        limit = math.isqrt(size) if most < 0 else min(most, math.isqrt(size))
        smaller = next(number for number in range(max(1, limit), 0, -1) if size % number == 0)
    return min(smaller, size // smaller), max(smaller, size // smaller)


def _dense(product: Tensor, scale: float, dtype: torch.dtype) -> LowRank:
    """Return a matrix (out, in) as a LoRA, paired with an identity."""
    out, size = product.shape
    product = product.to(dtype)
    identity = torch.eye(min(out, size), dtype=dtype, device=product.device)
    down, up = (product, identity) if out <= size else (identity, product)
    return LowRank.of(down, up, scale * identity.shape[0])


def _pair_of(part: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return a factor as two matrices, a single one paired with the identity on its smaller side."""
    if len(part) == 2:
        return part[0], part[1]
    whole = part[0]
    identity = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
    return (whole, identity) if whole.shape[1] <= whole.shape[0] else (identity, whole)
