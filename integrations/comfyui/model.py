"""An XUT as ComfyUI's MODEL: the network that samplers call, its latent normalization, text and camera inputs.

Shapes: B rows (conditionings times images), C latent channels, H×W latent, L text tokens, D width of the text encoder.
"""

from dataclasses import dataclass, field
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models_base
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdm_lightning.diffusion.sampling import shifted_grid
from hdm_lightning.errors import UserError
from hdm_lightning.generation.guided_branches import computing_in
from hdm_lightning.models import XUT
from hdm_lightning.models.positions import token_positions
from hdm_lightning.precision import solver_dtype

CAMERA, KEEP = "hdm_camera", "hdm_keep"
"""Keys of (x_shift, y_shift, zoom) in a conditioning, and of the kept tokens (B, K) in the transformer options."""
STILL = (0.0, 0.0, 1.0)
LATEST_TIME = 1.001
"""Times are in [0, 1]; some nodes multiply them by 1000, which is reported."""
EXACT = ("sample_flow", "sample_euler", "sample_heun")
"""Sampler functions to run in float64: this pack's, and ComfyUI's that hdm-sample has too; some others need float32."""


@dataclass(frozen=True)
class Facts:
    """What nodes need to know of a loaded model.

    Attributes:
        factor: image pixels per latent cell along one side.
        channels: latent channels.
        patch: latent cells per token along one side.
        context_width: size of the text encoder's vectors.
        sha256: hash of the network's weights, by which an adapter recognizes its base.
        sampling: default sampling settings, as recorded by the training run.
    """

    factor: int
    channels: int
    patch: int
    context_width: int
    sha256: str
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def multiple(self) -> int:
        """Widths and heights must be multiples of this."""
        return self.factor * self.patch


class DiffusionModel(XUT):
    """An XUT under its own tensor names, with the call signature of ComfyUI's diffusion models.

    Args:
        network: source of the weights, which are shared.
        facts: facts about the model.
        autocast: lower precision to compute in; None uses the precision of the weights.
    """

    def __init__(self, network: XUT, facts: Facts, autocast: torch.dtype | None) -> None:
        with torch.device("meta"):
            super().__init__(network.config)
        self.load_state_dict(network.state_dict(), assign=True)
        self.eval().requires_grad_(False)
        self.facts, self.autocast = facts, autocast

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        *,
        lengths: Tensor | None = None,
        camera: Tensor | None = None,
        **_later: Any,
    ) -> Tensor:
        """Return the velocity (B,C,H,W) at times (B,), for texts (B,L,D) of `lengths` (B,) tokens."""
        require_latent(x, self.facts)
        if control is not None:
            what = "is for a model of another kind: these networks have no ControlNet"
            raise UserError(what, where="ControlNet", hint="remove its node")
        # When ComfyUI moves a model in parts, it only moves modules with parameters.
        self.time_embedding.frequencies = self.time_embedding.frequencies.to(x.device)
        if float(timesteps.max()) > LATEST_TIME:
            hint = "shift the times with ModelSamplingAuraFlow instead of ModelSamplingSD3"
            raise UserError(
                f"times go up to {float(timesteps.max()):g} instead of 1", where="model sampling", hint=hint
            )
        if lengths is not None and bool((lengths == context.shape[1]).all()):
            lengths = None  # no mask, as when each text runs alone
        keep = (transformer_options or {}).get(KEEP)
        if keep is not None:
            keep = keep.to(x.device).repeat(len(x) // len(keep), 1)
        with computing_in(self.autocast, x.device):
            velocity = super().forward(
                x,
                timesteps,
                context,
                context_lengths=lengths,
                token_positions=self._positions(x, camera),
                keep=keep,
            )
        return velocity.to(x.dtype)

    def _positions(self, x: Tensor, camera: Tensor | None) -> Tensor:
        """Return token positions (1 or B, N, 2) for the cameras (B, 3)."""
        views = [STILL] if camera is None else camera.tolist()
        size = [side // self.config.patch_size for side in x.shape[2:]]
        seen = [
            token_positions(*size, convention=self.config.positions, shift=(down, right), zoom=zoom, device=x.device)
            for right, down, zoom in (views[:1] if all(view == views[0] for view in views) else views)
        ]
        return torch.cat(seen)


def require_latent(x: Tensor, facts: Facts) -> None:
    """Raise UserError unless latents have the model's channels and a size that divides into patches."""
    if x.dim() != 4 or x.shape[1] != facts.channels:
        what = f"latents of {tuple(x.shape)} do not have the model's {facts.channels} channels"
        raise UserError(
            what, where="latent_image", hint="use HDM Empty Latent, or encode with the VAE of HDM Load Model"
        )
    if any(side % facts.patch for side in x.shape[2:]):
        height, width = (side * facts.factor for side in x.shape[2:])
        near = "x".join(str(max(1, round(side / facts.multiple)) * facts.multiple) for side in (width, height))
        what = f"both sides of a {width}x{height} image must be multiples of {facts.multiple}"
        raise UserError(what, where="latent_image", hint=f"use {near}")


class LatentFormat(comfy.latent_formats.LatentFormat):
    """Converts the autoencoder's latents to normalized ones, (z − mean) / std per channel, and back."""

    def __init__(self, mean: Tensor, std: Tensor, factor: int) -> None:
        self.mean, self.std = mean.float().cpu().view(1, -1, 1, 1), std.float().cpu().view(1, -1, 1, 1)
        self.latent_channels = self.mean.shape[1]
        self.spacial_downscale_ratio = factor

    def process_in(self, latent: Tensor) -> Tensor:
        """Normalize."""
        return (latent - self.mean.to(latent)) / self.std.to(latent)

    def process_out(self, latent: Tensor) -> Tensor:
        """Undo the normalization."""
        return latent * self.std.to(latent) + self.mean.to(latent)


class Configuration(comfy.supported_models_base.BASE):
    """The model configuration that ComfyUI requires."""

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012  (as ComfyUI declares it)
    supported_inference_dtypes = [torch.float32]  # noqa: RUF012

    def __init__(self, latent_format: LatentFormat, shift: float) -> None:
        super().__init__({})
        self.latent_format = latent_format
        self.sampling_settings = {"shift": shift, "multiplier": 1.0}


class PaddedText(comfy.conds.CONDRegular):
    """Text states (B,L,D), padded with zeros to share a pass with longer ones; the lengths mask the padding.

    ComfyUI's own class repeats the shorter text, which would change the result: image and text share one attention.
    """

    def can_concat(self, other: Any) -> bool:
        """Return whether the widths agree; lengths may differ."""
        return isinstance(other, PaddedText) and self.cond.shape[2] == other.cond.shape[2]

    def concat(self, others: Any) -> Tensor:
        """Return all of them padded and joined, (ΣB, max L, D)."""
        conds = [self.cond, *(other.cond for other in others)]
        longest = max(cond.shape[1] for cond in conds)
        return torch.cat([F.pad(cond, (0, 0, 0, longest - cond.shape[1])) for cond in conds])


class FlowTimes(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """The times of hdm-sample, with image and noise mixed in the noise's dtype."""

    def __init__(self, configuration: Configuration) -> None:
        super().__init__(configuration)
        times = shifted_grid(len(self.sigmas), configuration.sampling_settings["shift"])[:-1].flip(0)
        self.register_buffer("sigmas", times.to(self.sigmas))

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """Return the start of sampling (B, C, H, W)."""
        return super().noise_scaling(sigma.to(noise), noise, latent_image.to(noise), max_denoise)


def sampling_precisely(
    executor: Any,
    guider: Any,
    sigmas: Tensor,
    extra_args: Any,
    callback: Any,
    noise: Tensor,
    latent_image: Tensor,
    *more: Any,
    **named: Any,
) -> Any:
    """Run the samplers in `EXACT` with noise (B, C, H, W) in the dtype that hdm-sample integrates in.

    They convert a velocity to a clean image and back; in float32 that would round the network's input.
    """
    function = getattr(executor.class_obj, "sampler_function", None)
    dtype = solver_dtype(noise.device) if getattr(function, "__name__", None) in EXACT else noise.dtype
    drawn = executor(guider, sigmas, extra_args, callback, noise.to(dtype), latent_image, *more, **named)
    return drawn.to(noise.dtype)


class HDMModel(comfy.model_base.BaseModel):
    """A loaded model, which ComfyUI's samplers treat as a flow-matching model."""

    def __init__(self, network: DiffusionModel, latent_format: LatentFormat) -> None:
        shift = float(network.facts.sampling.get("shift", 1.0))
        super().__init__(
            Configuration(latent_format, shift),
            comfy.model_base.ModelType.FLOW,
            device=torch.device("cpu"),
            unet_model=lambda **_: network,
        )
        self.model_sampling = FlowTimes(self.model_config)
        self.facts = network.facts

    def extra_conds(self, **given: Any) -> dict[str, Any]:
        """Return the network's inputs from a conditioning: text, its lengths and the camera."""
        text = given.get("cross_attn")
        if text is None or text.shape[-1] != self.facts.context_width:
            got = "no text" if text is None else f"vectors of {text.shape[-1]}"
            what = f"has {got}, but the model reads vectors of {self.facts.context_width}"
            raise UserError(what, where="conditioning", hint="encode the prompts with the CLIP of HDM Load Model")
        camera = torch.tensor([given.get(CAMERA, STILL)], dtype=torch.float32)
        lengths = torch.full((text.shape[0],), text.shape[1], dtype=torch.int64)
        return {
            "c_crossattn": PaddedText(text),
            "lengths": comfy.conds.CONDRegular(lengths),
            "camera": comfy.conds.CONDRegular(camera),
        }


class Held(nn.Module):
    """Wraps a model of another library whose `device` cannot be set, as ComfyUI sets it on models that it moves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def patcher_of(model: Any, load_device: torch.device, offload_device: torch.device) -> Any:
    """Return a ModelPatcher, with which ComfyUI moves a model between its devices."""
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)


def facts_of(model: Any) -> Facts:
    """Return the facts of a MODEL. Raises UserError: it is of another kind."""
    if not isinstance(model.model, HDMModel):
        what = f"is a {type(model.model).__name__}, not a model of hdm-lightning"
        raise UserError(what, where="model", hint="connect the MODEL of HDM Load Model")
    return model.model.facts
