"""Moving averages of the weights, exponential and power-function, kept in float32 next to the network."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hdm_lightning.errors import UserError
from hdm_lightning.training.averaging.power_function import WIDEST, step_decay, width_name
from hdm_lightning.training.strategies.sharded_tensors import copy_whole, is_sharded, local_parts, whole


class ParameterAverages:
    """Several averages of one network's trainable parameters, counted in samples.

    Exponential ones have a half-life: after a step of b samples with n samples seen in all, an average moves by
    1 − 0.5^(b / h) toward the weights, with h = min(half-life, ramp · n), so early averages reach back over only a
    share of the run (the warm-up of EDM2, arXiv 2312.02696, in its traditional-EMA form). Power-function ones have a
    relative width and reach back over that share of the run, see `training.averaging.power_function`; any other width
    can be reconstructed from them after training. They come after the exponential ones.

    If the network's parameters are sharded over the processes, the averages are sharded in the same way.

    Args:
        network: the network in training; its buffers are shared, its parameters are copied.
        halflife_samples: one exponential average per entry.
        ramp: see above; 0 disables the warm-up.
        sigma_rel: one power-function average per entry.
    """

    def __init__(
        self,
        network: nn.Module,
        halflife_samples: Sequence[float],
        ramp: float = 0.05,
        sigma_rel: Sequence[float] = (),
    ) -> None:
        self.network = network
        self.halflives = tuple(halflife_samples)
        self.widths = tuple(sigma_rel)
        self.ramp = ramp
        self.samples_seen = 0
        self._skeleton: nn.Module | None = None
        self._names = [name for name, value in network.named_parameters() if value.requires_grad]
        self.shadows = [[weight.float().clone() for weight in self._weights()] for _ in (*self.halflives, *self.widths)]

    def _weights(self) -> list[Tensor]:
        parameters = dict(self.network.named_parameters())
        return [parameters[name].detach() for name in self._names]

    def names(self) -> list[str]:
        """Return a name per average, such as `ema_500k` or `power_0.050`."""
        exponential = [f"ema_{_short(halflife)}" for halflife in self.halflives]
        return exponential + [f"power_{width_name(width)}" for width in self.widths]

    @torch.no_grad()
    def update(self, samples: int) -> None:
        """Update every average after an optimizer step of `samples` samples (all devices together)."""
        self.samples_seen += samples
        weights = [weight.float() for weight in local_parts(self._weights())]  # no copy if they are already float32
        for shadow, decay in zip(self.shadows, self._decays(samples), strict=True):
            torch._foreach_lerp_(local_parts(shadow), weights, 1 - decay)

    def _decays(self, samples: int) -> list[float]:
        """Return the decay of each average in the step of `samples` samples that has just been counted."""
        reaches = [min(h, self.ramp * self.samples_seen) if self.ramp else h for h in self.halflives]
        exponential = [0.5 ** (samples / max(reach, 1e-9)) for reach in reaches]
        return exponential + [step_decay(width, self.samples_seen, samples) for width in self.widths]

    @torch.no_grad()
    def restart(self) -> None:
        """Reset every average to the network's current weights."""
        self.samples_seen = 0
        for shadow in self.shadows:
            torch._foreach_copy_(local_parts(shadow), local_parts(self._weights()))

    def weights(self, which: int) -> dict[str, Tensor]:
        """Return the network's state dict with the weights of average number `which`, buffers included."""
        averaged = self.averaged(which)
        return {name: averaged.get(name, value.detach()) for name, value in self.network.state_dict().items()}

    def averaged(self, which: int) -> dict[str, Tensor]:
        """Return only the trained parameters of average number `which`, by name."""
        return dict(zip(self._names, self.shadows[which], strict=True))

    def to(self, device: torch.device) -> None:
        """Move the averages to a device; those of a sharded network stay with its shards."""
        if not is_sharded(self.network):
            self.shadows = [[value.to(device) for value in shadow] for shadow in self.shadows]

    def bound(self, which: int) -> "AveragedNetwork":
        """Return a callable that runs the network with average number `which`; the trained weights stay as they are."""
        return AveragedNetwork(self, which)

    def skeleton(self) -> nn.Module:
        """Return a copy of the network without weights, to be called with an average's."""
        if self._skeleton is None:
            self._skeleton = copy.deepcopy(self.network).to("meta").requires_grad_(False)
        return self._skeleton

    @contextmanager
    def exchanged(self, which: int) -> Iterator[None]:
        """Swap the network's weights with average number `which` inside a with statement."""
        # Taken now: after an exception during a forward pass the network has gathered tensors in their place.
        weights = local_parts(self._weights())
        self._exchange(weights, which)
        try:
            yield
        finally:
            self._exchange(weights, which)

    @torch.no_grad()
    def _exchange(self, weights: list[Tensor], which: int) -> None:
        for weight, shadow in zip(weights, local_parts(self.shadows[which]), strict=True):
            kept = weight.clone()
            weight.copy_(shadow)
            shadow.copy_(kept)
        torch.clear_autocast_cache()  # it keeps half-precision copies of the old values

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers and whole tensors; all processes must call this together."""
        shadows = whole([self.averaged(which) for which in range(len(self.shadows))])
        count = {"samples_seen": self.samples_seen, "halflives": list(self.halflives), "widths": list(self.widths)}
        return {**count, "shadows": shadows}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load saved averages; one whose half-life was not saved starts from the nearest.

        Raises:
            UserError: a power-function average was not saved; it must be kept from the first sample of the run.
        """
        self.samples_seen = int(state["samples_seen"])
        halflives, widths = list(state["halflives"]), list(state.get("widths", []))
        sources = [_nearest(halflives, halflife) for halflife in self.halflives]
        sources += [len(halflives) + _place(widths, width) for width in self.widths]
        for shadow, source in zip(self.shadows, sources, strict=True):
            copy_whole(shadow, [state["shadows"][source][name] for name in self._names])


def _nearest(saved: list[float], halflife: float) -> int:
    if not saved:
        raise UserError(
            "the checkpoint has no exponential average to start from",
            where="callbacks.weight_averages.halflife_samples",
            hint="leave it empty, as when the run started",
        )
    return min(range(len(saved)), key=lambda i: abs(saved[i] - halflife))


def _place(saved: list[float], width: float) -> int:
    if width not in saved:
        raise UserError(
            f"the checkpoint has no power-function average of width {width} (it has: {saved or 'none'})",
            where="callbacks.weight_averages.sigma_rel",
            hint="keep the widths that the run started with; others can be reconstructed from them afterward "
            "(hdm-convert --average)",
        )
    return saved.index(width)


def check_averages(halflife_samples: Sequence[float], sigma_rel: Sequence[float]) -> None:
    """Check half-lives and relative widths.

    Raises:
        UserError: a value is out of range or repeated.
    """
    for where, values, top in (("halflife_samples", halflife_samples, math.inf), ("sigma_rel", sigma_rel, WIDEST)):
        if any(not 0 < value <= top for value in values) or len(set(values)) < len(values):
            hint = f"use distinct values above 0{'' if top == math.inf else f', at most {top}'}"
            what = f"{list(values)} has a value that is out of range or repeated"
            raise UserError(what, where=f"callbacks.weight_averages.{where}", hint=hint)


class AveragedNetwork:
    """The network with averaged weights in place of the trained ones, called in the same way.

    A sharded network gathers only its own parameters, so the averages are swapped with them during a call, which all
    processes must make together.
    """

    def __init__(self, averages: ParameterAverages, which: int) -> None:
        self._averages = averages
        self._which = which
        self.config = getattr(averages.network, "config", None)

    def parameters(self) -> Iterator[Tensor]:
        """Iterate over the averaged weights."""
        return iter(self._averages.shadows[self._which])

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the network's forward with the averaged weights."""
        if is_sharded(self._averages.network):
            with self._averages.exchanged(self._which):
                return self._averages.network(*args, **kwargs)
        weights = self._averages.weights(self._which)
        buffers = dict(self._averages.network.named_buffers())
        return functional_call(self._averages.skeleton(), {**buffers, **weights}, args, kwargs)


def _short(count: float) -> str:
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        short = f"{count / size:g}"
        if count >= size and float(short) == count / size:  # otherwise two half-lives could share a name
            return f"{short}{unit}"
    return str(count)
