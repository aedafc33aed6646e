"""Exponential moving averages of the weights, kept in float32 beside the network."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class WeightAverages:
    """Several averages of one network's trainable parameters, each with a half-life in samples.

    After a step of b samples with n samples seen in all, an average moves by 1 − 0.5^(b / h) towards the
    weights, with h = min(half-life, ramp · n): early averages reach back over a share of the run only
    (the warm-up of EDM2, arXiv 2312.02696, in its traditional-EMA form).

    Args:
        network: the network that is trained; its buffers are shared, its parameters are copied.
        halflife_samples: one average per entry.
        ramp: see above; 0 disables the warm-up.
    """

    def __init__(self, network: nn.Module, halflife_samples: Sequence[int], ramp: float = 0.05) -> None:
        self.network = network
        self.halflives = tuple(halflife_samples)
        self.ramp = ramp
        self.samples_seen = 0
        self._skeleton = copy.deepcopy(network).to("meta").requires_grad_(False)
        self._names = [name for name, value in network.named_parameters() if value.requires_grad]
        self.shadows = [self._copy() for _ in self.halflives]

    def _weights(self) -> list[Tensor]:
        parameters = dict(self.network.named_parameters())
        return [parameters[name].detach() for name in self._names]

    def _copy(self) -> list[Tensor]:
        return [weight.float().clone() for weight in self._weights()]

    def names(self) -> list[str]:
        """A name per average, such as `ema_500k`."""
        return [f"ema_{_short(halflife)}" for halflife in self.halflives]

    @torch.no_grad()
    def update(self, samples: int) -> None:
        """Move every average after an optimiser step of `samples` samples (all devices together)."""
        self.samples_seen += samples
        weights = [weight.float() for weight in self._weights()]  # no copy where they are float32 already
        for shadow, halflife in zip(self.shadows, self.halflives, strict=True):
            reach = min(halflife, self.ramp * self.samples_seen) if self.ramp else halflife
            torch._foreach_lerp_(shadow, weights, 1 - 0.5 ** (samples / max(reach, 1e-9)))

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the past: every average becomes the network's present weights."""
        self.samples_seen = 0
        for shadow in self.shadows:
            torch._foreach_copy_(shadow, self._weights())

    def weights(self, which: int) -> dict[str, Tensor]:
        """State dict of average number `which`, buffers included: what a checkpoint of the model holds."""
        averaged = dict(zip(self._names, self.shadows[which], strict=True))
        return {name: averaged.get(name, value.detach()) for name, value in self.network.state_dict().items()}

    def bound(self, which: int) -> "AveragedNetwork":
        """The network run with average number `which`; the trained weights are not touched."""
        return AveragedNetwork(self, which)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        shadows = [dict(zip(self._names, shadow, strict=True)) for shadow in self.shadows]
        return {"samples_seen": self.samples_seen, "halflives": list(self.halflives), "shadows": shadows}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved averages; an average whose half-life was not saved starts from the nearest one."""
        self.samples_seen = int(state["samples_seen"])
        saved = list(state["halflives"])
        for shadow, halflife in zip(self.shadows, self.halflives, strict=True):
            nearest = min(range(len(saved)), key=lambda i: abs(saved[i] - halflife))
            torch._foreach_copy_(shadow, [state["shadows"][nearest][name] for name in self._names])


class AveragedNetwork:
    """Callable like the network, with averaged weights in place of the trained ones."""

    def __init__(self, averages: WeightAverages, which: int) -> None:
        self._averages = averages
        self._which = which
        self.config = getattr(averages.network, "config", None)

    def parameters(self) -> Iterator[Tensor]:
        """The averaged weights."""
        return iter(self._averages.shadows[self._which])

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the network's forward with the averaged weights."""
        weights = self._averages.weights(self._which)
        buffers = dict(self._averages.network.named_buffers())
        return functional_call(self._averages._skeleton, {**buffers, **weights}, args, kwargs)


def _short(count: int) -> str:
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if count >= size:
            return f"{count / size:g}{unit}"
    return str(count)
