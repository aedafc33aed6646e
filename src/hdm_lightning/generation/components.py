"""The pipeline components that diffusers lacks: the XUT and the flow's solver, in a form it can save and load."""

import inspect
from typing import Any, Self

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from hdm_lightning.diffusion import sampling
from hdm_lightning.encoders.autoencoder import KLAutoencoder
from hdm_lightning.encoders.caches import CachedAutoencoder, CachedTextEncoder
from hdm_lightning.encoders.text import TransformersTextEncoder
from hdm_lightning.models import XUT, XUTConfig


class XUTTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """An XUT that diffusers can save, load, move, offload and adapt; called like the XUT itself.

    Args:
        fields: those of `XUTConfig`.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        config = XUTConfig.from_json(fields)
        self.register_to_config(**config.to_json())
        self.network = XUT(config)

    # diffusers takes from the signature which fields of a config.json to pass to the constructor.
    __init__.__signature__ = inspect.signature(XUTConfig.__init__)  # type: ignore[attr-defined]

    @classmethod
    def around(cls, network: XUT) -> Self:
        """Wrap an existing network, without copying it."""
        transformer = cls.__new__(cls)
        ModelMixin.__init__(transformer)
        transformer.register_to_config(**network.config.to_json())
        transformer.network = network
        return transformer.train(network.training)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """See `models.xut.XUT.forward`."""
        return self.network(*arguments, **named)


class FlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The time grid of the flow, from noise at 1 to the image at 0, and the solver that integrates along it.

    A solver evaluates the velocity when it needs to, sometimes twice a step, so there is no `step` method.

    Args:
        solver: a name in `diffusion.sampling.SOLVERS`.
        shift: time-grid shift; above 1 spends more steps near noise.

    Raises:
        ValueError: there is no such solver, or the shift is out of its range.
    """

    config: Any

    @register_to_config
    def __init__(self, solver: str = "ab2", shift: float = 1.0) -> None:
        if not isinstance(solver, str) or solver not in sampling.SOLVERS:
            raise ValueError(f"solver: got {solver!r}, expected one of {', '.join(sampling.SOLVERS)}")
        if not isinstance(shift, int | float):
            raise ValueError(f"shift: got {shift!r}, expected a number")
        sampling.shifted_grid(1, shift)

    def grid(self, steps: int, *, start: float = 1.0) -> Tensor:
        """Return `steps` + 1 decreasing times from `start` to 0, float64 on the CPU.

        They are rounded to float32, which networks and other samplers take, unless two times would become equal.
        """
        grid = sampling.shifted_grid(steps, self.config.shift, start=start)
        rounded = grid.float().double()
        return rounded if bool((rounded.diff() < 0).all()) else grid

    def solve(
        self, velocity: sampling.Velocity, x: Tensor, grid: Tensor, on_step: sampling.OnStep | None = None
    ) -> Tensor:
        """Integrate `x` (B, …) from the grid's first time to its last; see `diffusion.sampling`."""
        solver = sampling.SOLVERS[self.config.solver]
        return solver(velocity, x, grid) if on_step is None else solver(velocity, x, grid, on_step)


def model_of(encoder: Any) -> Any:
    """Return the model inside a frozen encoder, which diffusers can move and save; anything else unchanged."""
    if isinstance(encoder, CachedAutoencoder):
        encoder = encoder.autoencoder
    if isinstance(encoder, CachedTextEncoder):
        encoder = encoder.encoder
    return encoder.model if isinstance(encoder, KLAutoencoder | TransformersTextEncoder) else encoder
