"""LoRA (arXiv 2106.09685) by the package peft: small matrices beside a network's layers, which alone are trained."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.interop.adapters import Adapter, Base, LowRank, base_state, require_peft, weights_sha256

NAME = "default"
"""Of the adapter in peft's layers."""
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
_PARAMETER = re.compile(r"\.lora_([AB])\.default\.weight")


class LoRA:
    """Puts low-rank adapters beside layers of a network, and freezes all else.

    Works in place, on any network with linear layers; what has been adapted goes into any `FlowModule` with
    `rule="constant"`, whose checkpoints then hold the adapter alone. At first the network computes what it did before,
    bit for bit. Needs the package peft.

    Args:
        rank: of the matrices, at least 1.
        alpha: what they add is scaled by alpha / rank; None is the rank, so that the scale is 1.
        targets: words of `TARGETS`, or patterns (regular expressions) of whole layer names.

    Raises:
        UserError: peft is not installed, or no layer fits a target.
    """

    def __init__(
        self,
        rank: Annotated[int, Field(ge=1)] = 16,
        alpha: Annotated[float, Field(gt=0)] | None = None,
        targets: Sequence[str] = ("attention", "feed_forward"),
    ) -> None:
        if rank < 1:
            raise UserError(f"{rank} is no rank", where="rank", hint="give 1 or more; without a LoRA, adapter=null")
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)

    def __call__(self, network: nn.Module) -> Any:
        """The same network, adapted; the adapters are drawn from torch's default generator."""
        require_peft("LoRA")
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

    def layers(self, network: nn.Module) -> list[str]:
        """Names of the layers that are adapted, in the network's order."""
        linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        if any("lora_" in name for name in linear):
            raise UserError("the network has an adapter already", where="LoRA", hint="merge it first")
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


def _pattern(target: str) -> re.Pattern[str]:
    try:
        return re.compile(TARGETS.get(target, target))
    except re.error as error:
        hint = f"choose some of {', '.join(TARGETS)}"
        raise UserError(f"{target!r} is no pattern ({error})", where="targets", hint=hint) from error


def is_adapted(network: nn.Module) -> bool:
    """Whether a network has the adapters of a `LoRA`."""
    return any(_PARAMETER.search(name) for name, _ in network.named_parameters())


def adapter_of(
    network: nn.Module,
    *,
    base: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Adapter:
    """What a network has learned beside its base, to be written by `interop.adapter_files`.

    Args:
        network: adapted by `LoRA`.
        base: folder or hub name of what it began with.
        weights: other values of the adapter's parameters, such as their averages.
        settings: plain values that travel with it.

    Raises:
        UserError: the network is not adapted.
    """
    values = {**dict(network.named_parameters()), **(weights or {})}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        if (found := _PARAMETER.search(name)) is not None:
            pairs.setdefault(name[: found.start()], {})[found[1]] = value.detach().cpu().clone()
    if not pairs:
        raise UserError("has no adapter", where="network", hint="adapt it first: LoRA(…)(network)")
    modules: dict[str, Any] = dict(network.named_modules())
    layers = {
        name: LowRank(pair["A"], pair["B"], float(modules[name].scaling[NAME]) * pair["A"].shape[0])
        for name, pair in pairs.items()
    }
    return Adapter(layers, Base(base, weights_sha256(base_state(network.state_dict()))), settings or {})
