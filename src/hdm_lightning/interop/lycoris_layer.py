"""LoHa and LoKr, the adapters of LyCORIS (arXiv 2309.14859), as tensors: matrices composed of fewer numbers.

Both have an exact form of two matrices, so programs that only know LoRAs can use them: a LoHa of rank r becomes a LoRA
of rank r², a LoKr one whose rank is the product of its factors' ranks.

Shapes: r rank, in = c·d and out = a·b the sizes of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hdm_lightning.interop.low_rank_layer import AdapterLayer, LowRank

HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


@dataclass(frozen=True)
class Hadamard(AdapterLayer):
    """LoHa: scale · (w1_a @ w1_b) ∘ (w2_a @ w2_b), element by element.

    Args:
        w1_a, w2_a: (out, r).
        w1_b, w2_b: (r, in).
        alpha: the scale is alpha / r.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float

    kind = "LOHA"

    @property
    def rank(self) -> int:
        """r."""
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it is added to."""
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the ends of their names in files."""
        return dict(zip(HADAMARD, (self.w1_a, self.w1_b, self.w2_a, self.w2_b), strict=True))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Hadamard:
        """Return a copy with other tensors under these names."""
        w1_a, w1_b, w2_a, w2_b = (tensors[name] for name in HADAMARD)
        return Hadamard(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, alpha=self.alpha)

    def product(self) -> Tensor:
        """Return the product (out, in) in float64."""
        return (self.w1_a.double() @ self.w1_b.double()) * (self.w2_a.double() @ self.w2_b.double())

    def folded(self) -> Hadamard:
        """Return an equal layer with the scale folded into `w1_a`."""
        return replace(self, w1_a=self.w1_a * self.scale, alpha=float(self.rank))

    def low_rank(self) -> LowRank:
        """Return an equal LoRA of rank r², or of its full product if that is smaller."""
        if self.rank**2 >= min(self.shape):
            return dense(self.product(), self.scale, self.w1_a.dtype)
        down, up = hadamard_pair(self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        return LowRank(down, up, self.scale * down.shape[0])


@dataclass(frozen=True)
class Kronecker(AdapterLayer):
    """LoKr: scale · w1 ⊗ w2, either of which may be a product of two matrices.

    Args:
        w1: (a, c), or the pair (a, r), (r, c).
        w2: (b, d), or the pair (b, r), (r, d).
        alpha: the scale is alpha / r; r is 1 if neither factor is a pair.
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    alpha: float

    kind = "LOKR"

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

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the ends of their names in files."""
        found: dict[str, Tensor] = {}
        for name, part in (("lokr_w1", self.w1), ("lokr_w2", self.w2)):
            found |= {name: part[0]} if len(part) == 1 else {f"{name}_a": part[0], f"{name}_b": part[1]}
        return found

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Kronecker:
        """Return a copy with other tensors under these names."""
        return Kronecker(*kronecker_parts(tensors), alpha=self.alpha)

    def product(self) -> Tensor:
        """Return the product (out, in) in float64."""
        return torch.kron(*(_multiplied(tuple(one.double() for one in part)) for part in (self.w1, self.w2)))

    def folded(self) -> Kronecker:
        """Return an equal layer with the scale folded into the first factor."""
        return replace(self, w1=(self.w1[0] * self.scale, *self.w1[1:]), alpha=float(self.rank))

    def low_rank(self) -> LowRank:
        """Return an equal LoRA, of `kronecker_rank` or of its full product if that is smaller."""
        if kronecker_rank(self.w1, self.w2) >= min(self.shape):
            return dense(self.product(), self.scale, self.w1[0].dtype)
        down, up = kronecker_pair(self.w1, self.w2)
        return LowRank(down, up, self.scale * down.shape[0])


def hadamard_pair(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return down (r², in) and up (out, r²) whose product up @ down is (w1_a @ w1_b) ∘ (w2_a @ w2_b)."""
    down = (w1_b.unsqueeze(1) * w2_b.unsqueeze(0)).flatten(0, 1)
    return down, (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1)


def kronecker_rank(w1: tuple[Tensor, ...], w2: tuple[Tensor, ...]) -> int:
    """Return the rank of the two matrices of `kronecker_pair`."""
    return _inner(w1) * _inner(w2)


def kronecker_pair(w1: tuple[Tensor, ...], w2: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return down (R, in) and up (out, R) whose product up @ down is w1 ⊗ w2, for R = `kronecker_rank`.

    (A₁B₁) ⊗ (A₂B₂) = (A₁ ⊗ A₂)(B₁ ⊗ B₂); a single factor is paired with the identity.
    """
    (up1, down1), (up2, down2) = _split(w1), _split(w2)
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


def dense(product: Tensor, scale: float, dtype: torch.dtype) -> LowRank:
    """Return a matrix (out, in) as a LoRA, paired with an identity."""
    out, size = product.shape
    product = product.to(dtype)
    identity = torch.eye(min(out, size), dtype=dtype, device=product.device)
    down, up = (product, identity) if out <= size else (identity, product)
    return LowRank(down, up, scale * identity.shape[0])


def _inner(part: tuple[Tensor, ...]) -> int:
    return part[1].shape[0] if len(part) == 2 else min(part[0].shape)


def _split(part: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return a factor as two matrices whose inner size is `_inner`."""
    if len(part) == 2:
        return part[0], part[1]
    whole = part[0]
    identity = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
    return (whole, identity) if whole.shape[1] <= whole.shape[0] else (identity, whole)


def _multiplied(part: tuple[Tensor, ...]) -> Tensor:
    return part[0] @ part[1] if len(part) == 2 else part[0]
