"""An AutoencoderKL of any shape as ComfyUI's VAE; ComfyUI's own only has the widths of Stable Diffusion's.

Shapes: B images, H×W pixels, C latent channels, f factor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from hdm_lightning.encoders.autoencoder import KLAutoencoder
from hdm_lightning.errors import UserError

from .model import Held, patcher_of

BYTES_PER_PIXEL = {"encode": 1300, "decode": 2600}
"""Memory that SDXL's autoencoder needs in float32, roughly; ComfyUI frees that much first."""
TILE = 64
"""Default tile size: latent cells along one side."""


class PictureVAE(comfy.sd.VAE):
    """VAE for ComfyUI's VAEDecode, VAEEncode and their tiled forms; encodes to the posterior's mean, as in hdm-sample.

    Args:
        autoencoder: with mean 0 and std 1, as the MODEL normalizes latents in ComfyUI.
    """

    def __init__(self, autoencoder: KLAutoencoder) -> None:
        self.autoencoder, self.first_stage_model = autoencoder, Held(autoencoder.model)
        self.device = comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        self.patcher = patcher_of(self.first_stage_model, self.device, comfy.model_management.vae_offload_device())
        self.vae_dtype, self.working_dtypes = torch.float32, [torch.float32]
        self.latent_channels, self.output_channels, self.latent_dim = autoencoder.channels, 3, 2
        self.downscale_ratio = self.upscale_ratio = autoencoder.factor
        self.downscale_index_formula = self.upscale_index_formula = self.extra_1d_channel = None
        self.disable_offload, self.not_video, self.crop_input, self.size = False, False, True, None

    def decode(self, samples_in: Tensor, vae_options: Any = None) -> Tensor:
        """Decode unnormalized latents (B, C, h, w) to images (B, H, W, 3) in [0, 1]."""
        if not samples_in.isfinite().all():
            hint = "lower the cfg, or load the model with precision float32"
            raise UserError("contain NaN or infinity, so there is no image", where="samples", hint=hint)
        if samples_in.shape[1] != self.latent_channels:
            what = f"latents {tuple(samples_in.shape)} do not have the autoencoder's {self.latent_channels} channels"
            raise UserError(what, where="samples", hint="decode with the VAE that belongs to the model")
        self._load("decode", samples_in.shape[2] * samples_in.shape[3] * self.upscale_ratio**2)
        pictures = self.autoencoder.decode(samples_in.to(self.device))
        return ((pictures + 1.0) / 2.0).clamp(0.0, 1.0).movedim(1, -1).to(self.output_device)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Encode images (B, H, W, 3) in [0, 1], center-cropped to multiples of f, to latents (B, C, H/f, W/f)."""
        pictures = self.vae_encode_crop_pixels(pixel_samples)[..., :3].movedim(-1, 1)
        self._load("encode", pictures.shape[2] * pictures.shape[3])
        latent = self.autoencoder.encode(pictures.to(self.device).float() * 2.0 - 1.0)
        return latent.to(self.output_device)

    def decode_tiled(self, samples: Tensor, tile_x: int | None = None, tile_y: int | None = None, **_: Any) -> Tensor:
        """Decode like `decode`, in square tiles of `tile_x` or `tile_y` latent cells, whichever is smaller."""
        with self._tiled(min(tile_x or TILE, tile_y or TILE)):
            return self.decode(samples)

    def encode_tiled(
        self, pixel_samples: Tensor, tile_x: int | None = None, tile_y: int | None = None, **_: Any
    ) -> Tensor:
        """Encode like `encode`, in square tiles of `tile_x` or `tile_y` pixels, whichever is smaller."""
        cells = (
            min(tile_x or TILE * self.downscale_ratio, tile_y or TILE * self.downscale_ratio) // self.downscale_ratio
        )
        with self._tiled(max(8, cells)):
            return self.encode(pixel_samples)

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """Center-crop images (B, H, W, …) to multiples of f."""
        height, width = (side // self.downscale_ratio * self.downscale_ratio for side in pixels.shape[1:3])
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        return pixels[:, top : top + height, left : left + width]

    def _load(self, what: str, pixels: int) -> None:
        needed = pixels * BYTES_PER_PIXEL[what]
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)

    @contextmanager
    def _tiled(self, cells: int) -> Iterator[None]:
        model, factor = self.autoencoder.model, self.downscale_ratio
        before = model.tile_latent_min_size, model.tile_sample_min_size
        model.enable_tiling()
        model.tile_latent_min_size, model.tile_sample_min_size = cells, cells * factor
        try:
            yield
        finally:
            model.disable_tiling()
            model.tile_latent_min_size, model.tile_sample_min_size = before
