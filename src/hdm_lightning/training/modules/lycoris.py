"""LoHa and LoKr (LyCORIS, arXiv 2309.14859): low-rank matrices made of fewer numbers, beside a network's layers.

The layers are this project's own and not those of the packages peft and lycoris-lora, which draw a random number in
every forward pass and branch on it: blocks could neither be compiled whole nor run again in the backward pass.

Shapes: r rank, in = c·d and out = a·b the sizes of a layer.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from hdm_lightning.interop.low_rank_layer import AdapterLayer
from hdm_lightning.interop.lycoris_layer import (
    HADAMARD,
    Hadamard,
    Kronecker,
    divisors,
    hadamard_pair,
    kronecker_pair,
    kronecker_parts,
    kronecker_rank,
)
from hdm_lightning.training.modules.adapted_layers import LayerAdapter

Kind = Literal["lokr", "loha"]


class LyCORIS(LayerAdapter):
    """Puts LoHa's or LoKr's factors beside layers of a network, and freezes all else.

    As `LoRA`, on any network with linear layers and for `FlowModule` with `rule="constant"`; at first the network
    computes what it did before, bit for bit.

    Args:
        kind: "lokr", a Kronecker product of two small matrices; "loha", an elementwise one of two low-rank products.
        rank: of the factors, at least 1; from half the size of LoKr's second factor on, that is a whole matrix.
        alpha: what they add is scaled by alpha / rank; None is the rank, so that the scale is 1. A LoKr of two whole
            matrices has the scale 1.
        targets: words of `adapted_layers.TARGETS`, or patterns (regular expressions) of whole layer names.
        factor: of LoKr: rows and columns of its first factor, at most; -1: about the root of the layer's.
        decompose_both: of LoKr: whether the first factor is a low-rank product, too.

    Raises:
        UserError: the rank is below 1, or no layer fits a target.
    """

    def __init__(
        self,
        kind: Kind = "lokr",
        rank: Annotated[int, Field(ge=1)] = 8,
        alpha: Annotated[float, Field(gt=0)] | None = None,
        targets: Sequence[str] = ("attention", "feed_forward"),
        factor: Annotated[int, Field(ge=-1)] = -1,
        decompose_both: bool = False,
    ) -> None:
        super().__init__(rank, alpha, targets)
        self.kind, self.factor, self.decompose_both = kind, factor, decompose_both

    def __call__(self, network: nn.Module) -> Any:
        """The same network, adapted; the factors are drawn from torch's default generator."""
        names = self.layers(network)
        network.requires_grad_(False)
        for name in names:
            parent, _, own = name.rpartition(".")
            holder = network.get_submodule(parent)
            setattr(holder, own, FactoredLinear(getattr(holder, own), self))
        return network

    def require_packages(self) -> None:
        """None are needed."""

    def parameters_beside(self, size: int, out: int) -> int:
        """How many numbers are trained beside a layer (out, size)."""
        return sum(tensor.numel() for tensor in self.tensors(out, size, torch.device("meta")).values())

    def elements_beside(self, size: int, out: int) -> int:
        """Elements of the matrices that a token is multiplied with beside a layer (out, size)."""
        if self.kind == "loha":
            rank = self.rank**2
        else:
            rank = kronecker_rank(*kronecker_parts(self.tensors(out, size, torch.device("meta"))))
        return min(rank * (out + size), out * size)

    def tensors(self, out: int, size: int, device: torch.device) -> dict[str, Tensor]:
        """The first values of a layer's factors by their names, which lycoris-lora has as well."""
        rank = self.rank

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device)

        if self.kind == "loha":
            return {
                "hada_w1_a": nn.init.normal_(empty(out, rank), std=0.1),
                "hada_w1_b": nn.init.normal_(empty(rank, size), std=1.0),
                "hada_w2_a": nn.init.zeros_(empty(out, rank)),
                "hada_w2_b": nn.init.normal_(empty(rank, size), std=1.0),
            }
        (a, b), (c, d) = divisors(out, self.factor), divisors(size, self.factor)
        found: dict[str, Tensor] = {}
        if self.decompose_both and rank < max(a, c) / 2:
            found |= {"lokr_w1_a": _uniform(empty(a, rank)), "lokr_w1_b": _uniform(empty(rank, c))}
        else:
            found["lokr_w1"] = _uniform(empty(a, c))
        if rank < max(b, d) / 2:
            found |= {"lokr_w2_a": _uniform(empty(b, rank)), "lokr_w2_b": nn.init.zeros_(empty(rank, d))}
        else:
            found["lokr_w2"] = nn.init.zeros_(empty(b, d))
        return found


class FactoredLinear(nn.Module):
    """A frozen linear layer with the factors of a LoHa or a LoKr beside it.

    Args:
        base_layer: of in and out features.
        adapter: which factors, and of which rank.
    """

    def __init__(self, base_layer: nn.Linear, adapter: LyCORIS) -> None:
        super().__init__()
        self.base_layer, self.kind = base_layer, adapter.kind
        weight = base_layer.weight
        out, size = weight.shape
        for name, tensor in adapter.tensors(out, size, weight.device).items():
            setattr(self, name, nn.Parameter(tensor.to(weight.dtype)))
        self.rank = adapter.rank
        whole = {"lokr_w1", "lokr_w2"} <= self.own().keys()
        self.scale = 1.0 if whole or adapter.alpha is None else adapter.alpha / adapter.rank

    @property
    def in_features(self) -> int:
        """As of the layer."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """As of the layer."""
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """Of the layer without what is beside it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the layer."""
        return self.base_layer.bias

    def own(self) -> dict[str, Tensor]:
        """The factors by their names."""
        return {name: value for name, value in self._parameters.items() if value is not None}

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return self.base_layer(x) + self.scale * self._added(x)

    def layer(self, values: dict[str, Tensor]) -> AdapterLayer:
        """What these values of the factors add to the layer."""
        if self.kind == "loha":
            w1_a, w1_b, w2_a, w2_b = (values[name] for name in HADAMARD)
            return Hadamard(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, alpha=self.scale * self.rank)
        found = Kronecker(*kronecker_parts(values), alpha=self.scale)
        return Kronecker(found.w1, found.w2, alpha=self.scale * found.rank)

    def _added(self, x: Tensor) -> Tensor:
        out, size = self.base_layer.weight.shape
        if self.kind == "loha":
            own = self.own()
            factors = [own[name] for name in HADAMARD]
            if self.rank**2 * (out + size) < out * size:
                down, up = hadamard_pair(*factors)
                return linear(linear(x, down), up)
            return linear(x, (factors[0] @ factors[1]) * (factors[2] @ factors[3]))
        w1, w2 = kronecker_parts(self.own())
        if kronecker_rank(w1, w2) * (out + size) < out * size:
            down, up = kronecker_pair(w1, w2)
            return linear(linear(x, down), up)
        first, second = (part[0] @ part[1] if len(part) == 2 else part[0] for part in (w1, w2))
        return linear(x, torch.kron(first, second))


def _uniform(tensor: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
