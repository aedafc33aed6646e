"""LoRA (arXiv 2106.09685) by the package peft: small matrices beside a network's layers, which alone are trained."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapters import Adapter, Base, base_state, require_peft, weights_sha256
from hdm_lightning.interop.low_rank_layer import AdapterLayer, LowRank
from hdm_lightning.training.modules.adapted_layers import LayerAdapter
from hdm_lightning.training.modules.lycoris import FactoredLinear

NAME = "default"
"""Of the adapter in peft's layers."""
_PARAMETER = re.compile(r"\.lora_([AB])\.default\.weight")


class LoRA(LayerAdapter):
    """Puts low-rank adapters beside layers of a network, and freezes all else.

    Works in place, on any network with linear layers; what has been adapted goes into any `FlowModule` with
    `rule="constant"`, whose checkpoints then hold the adapter alone. At first the network computes what it did before,
    bit for bit. Needs the package peft.

    Args:
        rank: of the matrices, at least 1.
        alpha: what they add is scaled by alpha / rank; None is the rank, so that the scale is 1.
        targets: words of `adapted_layers.TARGETS`, or patterns (regular expressions) of whole layer names.

    Raises:
        UserError: peft is not installed, or no layer fits a target.
    """

    def __init__(
        self,
        rank: Annotated[int, Field(ge=1)] = 16,
        alpha: Annotated[float, Field(gt=0)] | None = None,
        targets: Sequence[str] = ("attention", "feed_forward"),
    ) -> None:
        super().__init__(rank, alpha, targets)

    def require_packages(self) -> None:
        """Raise UserError unless peft is there."""
        require_peft("LoRA")

    def parameters_beside(self, size: int, out: int) -> int:
        """How many numbers are trained beside a layer (out, size)."""
        return self.rank * (size + out)

    def elements_beside(self, size: int, out: int) -> int:
        """Elements of the matrices that a token is multiplied with beside a layer (out, size)."""
        return self.parameters_beside(size, out)

    def __call__(self, network: nn.Module) -> Any:
        """The same network, adapted; the adapters are drawn from torch's default generator."""
        self.require_packages()
        from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415  (seconds to import, an extra)

        names = self.layers(network)
        alpha: Any = self.rank if self.alpha is None else self.alpha  # peft's annotation knows whole numbers alone
        config = LoraConfig(
            r=self.rank,
            lora_alpha=alpha,
            lora_dropout=0.0,  # blocks that are run again in the backward pass must compute what they did before
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
    """What a network has learned beside its base, to be written by `interop.adapter_files`.

    Args:
        network: adapted by `LoRA` or `LyCORIS`.
        base: folder or hub name of what it began with.
        weights: other values of the adapter's parameters, such as their averages.
        settings: plain values that travel with it.

    Raises:
        UserError: the network is not adapted.
    """
    values = {**dict(network.named_parameters()), **(weights or {})}
    layers = _low_rank_layers(network, values) | _factored_layers(network, values)
    if not layers:
        raise UserError("has no adapter", where="network", hint="adapt it first: LoRA(…)(network)")
    return Adapter(layers, Base(base, weights_sha256(base_state(network.state_dict()))), settings or {})


def _low_rank_layers(network: nn.Module, values: Mapping[str, Tensor]) -> dict[str, AdapterLayer]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        if (found := _PARAMETER.search(name)) is not None:
            pairs.setdefault(name[: found.start()], {})[found[1]] = _kept(value)
    modules: dict[str, Any] = dict(network.named_modules())
    return {
        name: LowRank(pair["A"], pair["B"], float(modules[name].scaling[NAME]) * pair["A"].shape[0])
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
