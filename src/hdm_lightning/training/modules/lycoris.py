"""LoHa and LoKr (LyCORIS, arXiv 2309.14859): adapters that need fewer parameters than LoRA for the same rank.

The layers are implemented here, since those of the packages peft and lycoris-lora draw a random number in every
forward pass and branch on it: blocks could then be neither compiled whole nor recomputed in the backward pass.

Shapes: r rank, in = c·d and out = a·b the sizes of a layer.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from hdm_lightning.interop.adapter_layers import (
    HADAMARD,
    AdapterLayer,
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
    """Adds LoHa or LoKr factors to layers of a network, and freezes everything else.

    Like `LoRA`, works on any network with linear layers, for a `FlowModule` with `rule="constant"`. Initially the
    network's output is unchanged, bit for bit.

    Args:
        kind: "lokr", a Kronecker product of two small matrices; "loha", an elementwise product of two low-rank ones.
        rank: rank of the factors, at least 1; from half the size of LoKr's second factor on, that is a full matrix.
        alpha: the adapter's output is scaled by alpha / rank; None means rank, so a scale of 1. A LoKr of two full
            matrices always has a scale of 1.
        targets: names in `adapted_layers.TARGETS`, or regular expressions that match whole layer names.
        factor: for LoKr, largest size of its first factor; -1 for about the square root of the layer's.
        decompose_both: for LoKr, whether the first factor is also a low-rank product.

    Raises:
        UserError: the rank is below 1, or a target matches no layer.
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
        """Adapt the network in place and return it; the factors are drawn from torch's default generator."""
        names = self.layers(network)
        network.requires_grad_(False)
        for name in names:
            parent, _, own = name.rpartition(".")
            holder = network.get_submodule(parent)
            setattr(holder, own, FactoredLinear(getattr(holder, own), self))
        return network

    def require_packages(self) -> None:
        """Do nothing: no packages are needed."""

    def parameters_beside(self, size: int, out: int) -> int:
        """Return the number of trained parameters added to a layer (out, size)."""
        return sum(tensor.numel() for tensor in self.tensors(out, size, torch.device("meta")).values())

    def elements_beside(self, size: int, out: int) -> int:
        """Return the number of multiplications per token added to a layer (out, size)."""
        if self.kind == "loha":
            rank = self.rank**2
        else:
            rank = kronecker_rank(*kronecker_parts(self.tensors(out, size, torch.device("meta"))))
        return min(rank * (out + size), out * size)

    def tensors(self, out: int, size: int, device: torch.device) -> dict[str, Tensor]:
        """Return the initial values of a layer's factors, with the names used by lycoris-lora."""
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
    """A frozen linear layer with the factors of a LoHa or LoKr added.

    Args:
        base_layer: the frozen layer.
        adapter: the kind and rank of the factors.
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
        """Input features of the layer."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Output features of the layer."""
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """Weight of the frozen layer, without the adapter."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the frozen layer."""
        return self.base_layer.bias

    def own(self) -> dict[str, Tensor]:
        """Return the factors by name."""
        return {name: value for name, value in self._parameters.items() if value is not None}

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return self.base_layer(x) + self.scale * self._added(x)

    def layer(self, values: dict[str, Tensor]) -> AdapterLayer:
        """Return the adapter layer that has these values as factors."""
        if self.kind == "loha":
            return Hadamard(values, self.scale * self.rank)
        return Kronecker(values, self.scale * Kronecker(values, 1.0).rank)

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
