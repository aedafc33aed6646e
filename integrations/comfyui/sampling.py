"""Sampling nodes: hdm-sample's solvers and times, routing guidance, and pixels rounded as in hdm-sample.

Shapes: B rows, C latent channels, H×W latent, N image tokens, K kept tokens.
"""

from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from hdm_lightning.diffusion import sampling
from hdm_lightning.diffusion.guidance import extrapolate
from hdm_lightning.models.routing import keep_from_scores

from .loaders import CATEGORY
from .model import KEEP, Facts, facts_of


class Solver:
    """HDM Solver: the solvers of hdm-sample, for SamplerCustom."""

    CATEGORY, FUNCTION = CATEGORY, "choose"
    RETURN_TYPES = ("SAMPLER",)
    DESCRIPTION = "euler (order 1), heun (2, two evaluations per step), ab2 (2, hdm-sample's default), ab3 (3)."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs, as ComfyUI shows them."""
        return {"required": {"solver": (list(sampling.SOLVERS), {"default": "ab2"})}}

    def choose(self, solver: str) -> tuple[Any]:
        """Return the sampler."""
        return (comfy.samplers.KSAMPLER(solving(sampling.SOLVERS[solver])),)


def solving(solver: sampling.Solver) -> Any:
    """Turn a solver of the flow into a sampler function of ComfyUI, whose models predict the clean image."""

    def sample_flow(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Any = None,
        callback: Any = None,
        disable: Any = None,
        **_: Any,
    ) -> Tensor:
        last: dict[str, Any] = {}

        def velocity(state: Tensor, t: float) -> Tensor:
            clean = model(state, state.new_full(state.shape[:1], t), **(extra_args or {}))
            last.update(t=t, clean=clean)
            return (state - clean) / t

        def on_step(done: int, state: Tensor) -> Tensor:
            if callback is not None:
                sigma = sigmas[done - 1]
                callback({"x": state, "i": done - 1, "sigma": sigma, "sigma_hat": sigma, "denoised": last["clean"]})
            return state

        return solver(velocity, x, sigmas.double().cpu(), on_step)

    return sample_flow


class Times:
    """HDM Times: the time grid of hdm-sample as SIGMAS, exact for any number of steps."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES = ("SIGMAS",)
    DESCRIPTION = "hdm-sample's times: --steps, --shift, and --strength for a start image."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs, as ComfyUI shows them."""
        own = "above 1 spends more steps near noise; 0 uses the shift recorded in the model"
        return {
            "required": {
                "model": ("MODEL",),
                "steps": ("INT", {"default": 28, "min": 1, "max": 10000}),
                "shift": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.01, "tooltip": own}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}),
            }
        }

    def make(self, model: Any, steps: int, shift: float, strength: float) -> tuple[Tensor]:
        """Return `steps` + 1 decreasing times."""
        shift = shift or float(facts_of(model).sampling.get("shift", 1.0))
        return (sampling.shifted_grid(steps, shift, start=strength).float(),)


class RoutingGuidance:
    """HDM Routing Guidance: away from a prediction that routes more tokens past the U (arXiv 2501.04765)."""

    CATEGORY, FUNCTION = CATEGORY, "guide"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        "Like --routing-guidance and --weak-rate of hdm-sample; works with cfg and any sampler. One more pass per step."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs, as ComfyUI shows them."""
        return {
            "required": {
                "model": ("MODEL",),
                "scale": ("FLOAT", {"default": 1.5, "min": 0.0, "max": 20.0, "step": 0.05}),
                "weak_rate": ("FLOAT", {"default": 0.5, "min": 0.05, "max": 0.95, "step": 0.05}),
            }
        }

    def guide(self, model: Any, scale: float, weak_rate: float) -> tuple[Any]:
        """Return a copy of the model with the guidance added."""
        guided, push = model.clone(), RoutingPush(facts_of(model), scale, weak_rate)
        guided.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "hdm_routing", push.around_sampling
        )
        guided.set_model_sampler_post_cfg_function(push)
        return (guided,)


class RoutingPush:
    """Adds routing guidance to each prediction; the routed tokens follow from the seed, as in hdm-sample."""

    def __init__(self, facts: Facts, scale: float, weak_rate: float) -> None:
        self.facts, self.scale, self.weak_rate = facts, scale, weak_rate
        self.generator = torch.Generator()

    def around_sampling(
        self, executor: Any, noise: Tensor, *arguments: Any, seed: int | None = None, **named: Any
    ) -> Any:
        """Reseed the generator, skip the numbers that the noise used, then sample."""
        positional = arguments[6] if len(arguments) > 6 else None
        self.generator = torch.Generator().manual_seed(int(seed if seed is not None else positional or 0))
        torch.randn(noise.shape[1:], generator=self.generator)
        return executor(noise, *arguments, **named) if seed is None else executor(noise, *arguments, seed=seed, **named)

    def __call__(self, given: dict[str, Any]) -> Tensor:
        """Return the guided prediction (B,C,H,W) of the clean image."""
        x, options = given["input"], given["model_options"]
        tokens = x.shape[2] * x.shape[3] // self.facts.patch**2
        scores = torch.stack([torch.rand(tokens, generator=self.generator) for _ in x])
        routed = {**options.get("transformer_options", {}), KEEP: keep_from_scores(scores, self.weak_rate)}
        options = {**options, "transformer_options": routed}
        conds = [given["cond"]]
        (weak,) = comfy.samplers.calc_cond_batch(given["model"], conds, x, given["sigma"], options)
        strong = given["cond_denoised"]
        return given["denoised"] + extrapolate(weak, strong, self.scale) - strong


class RoundPixels:
    """HDM Round Pixels: saved values are rounded, as in hdm-sample; ComfyUI alone truncates them."""

    CATEGORY, FUNCTION = CATEGORY, "round"
    RETURN_TYPES = ("IMAGE",)
    DESCRIPTION = "Rounds to the 256 levels of a PNG. Put it between VAE Decode and Save Image."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs, as ComfyUI shows them."""
        return {"required": {"image": ("IMAGE",)}}

    def round(self, image: Tensor) -> tuple[Tensor]:
        """Round each value to just above its level, so 255 times it is not truncated to the level below."""
        return (rounded(image),)


def rounded(image: Tensor) -> Tensor:
    """Round values in [0, 1] to the nearest of 256 levels, plus the smallest float step."""
    level = (image.float() * 255.0).round() / 255.0
    return torch.nextafter(level, torch.full_like(level, 2.0)).clamp(0.0, 1.0)
