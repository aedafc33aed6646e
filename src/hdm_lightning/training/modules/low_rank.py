"""LoRA (arXiv 2106.09685) with the package peft: adds low-rank matrices to layers and trains only those."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_layers import AdapterLayer, LowRank
from hdm_lightning.interop.adapters import Adapter, Base, base_state, require_peft, weights_sha256
from hdm_lightning.training.modules.adapted_layers import LayerAdapter
from hdm_lightning.training.modules.lycoris import FactoredLinear

NAME = "default"
"""Name of the adapter in peft's layers."""
_PARAMETER = re.compile(r"\.lora_([AB])\.default\.weight")


class LoRA(LayerAdapter):
    """Adds low-rank adapters to layers of a network, and freezes everything else.

    Works in place, on any network with linear layers. Train the adapted network in a `FlowModule` with
    `rule="constant"`; its checkpoints then contain only the adapter. Initially the network's output is unchanged, bit
    for bit. Needs the package peft.

    Args:
        rank: rank of the matrices, at least 1.
        alpha: the adapter's output is scaled by alpha / rank; None means rank, so a scale of 1.
        targets: names in `adapted_layers.TARGETS`, or regular expressions that match whole layer names.

    Raises:
        UserError: peft is not installed, or a target matches no layer.
    """

    def __init__(
        self,
        rank: Annotated[int, Field(ge=1)] = 16,
        alpha: Annotated[float, Field(gt=0)] | None = None,
        targets: Sequence[str] = ("attention", "feed_forward"),
    ) -> None:
        super().__init__(rank, alpha, targets)

    def require_packages(self) -> None:
        """Raise UserError unless peft is installed."""
        require_peft("LoRA")

    def parameters_beside(self, size: int, out: int) -> int:
        """Return the number of trained parameters added to a layer (out, size)."""
        return self.rank * (size + out)

    def __call__(self, network: nn.Module) -> Any:
        """Adapt the network in place and return it; the adapters are drawn from torch's default generator."""
        self.require_packages()
        from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415  (seconds to import, an extra)

        names = self.layers(network)
        alpha: Any = self.rank if self.alpha is None else self.alpha  # peft's annotation allows only integers
        config = LoraConfig(
            r=self.rank,
            lora_alpha=alpha,
            lora_dropout=0.0,  # blocks recomputed in the backward pass must give the same output
            target_modules="|".join(map(re.escape, names)),
        )
        inject_adapter_in_model(config, network, NAME)
        return network


def adapter_of(
    network: nn.Module,
    *,
    base: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Adapter:
    """Return the adapter of a network, for `interop.adapter_files` to write.

    Args:
        network: adapted by `LoRA` or `LyCORIS`.
        base: folder or hub name of the base model.
        weights: values to use instead of the adapter's parameters, such as their averages.
        settings: plain values to store with it.

    Raises:
        UserError: the network is not adapted.
    """
    values = {**dict(network.named_parameters()), **(weights or {})}
    layers = _low_rank_layers(network, values) | _factored_layers(network, values)
    if not layers:
        raise UserError("has no adapter", where="network", hint="add one first: LoRA(…)(network)")
    return Adapter(layers, Base(base, weights_sha256(base_state(network.state_dict()))), settings or {})


def _low_rank_layers(network: nn.Module, values: Mapping[str, Tensor]) -> dict[str, AdapterLayer]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        if (found := _PARAMETER.search(name)) is not None:
            pairs.setdefault(name[: found.start()], {})[found[1]] = _kept(value)
    modules: dict[str, Any] = dict(network.named_modules())
    return {
        name: LowRank.of(pair["A"], pair["B"], float(modules[name].scaling[NAME]) * pair["A"].shape[0])
        for name, pair in pairs.items()
    }


def _factored_layers(network: nn.Module, values: Mapping[str, Tensor]) -> dict[str, AdapterLayer]:
    modules = {name: each for name, each in network.named_modules() if isinstance(each, FactoredLinear)}
    return {
        name: module.layer({own: _kept(values[f"{name}.{own}"]) for own in module.own()})
        for name, module in modules.items()
    }


def _kept(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()
