"""A diffusers AutoencoderKL in training: build it, load it, and save it with its latent statistics.

Shapes: image (B,3,f·H,f·W) in [-1, 1]; latent (B,C,H,W), raw, as the encoder outputs it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdm_lightning.autoencoding.reconstruction import Posterior
from hdm_lightning.encoders.vae_folder import (
    AutoencoderKL,
    locate_autoencoder,
    read_autoencoder,
    write_autoencoder,
)
from hdm_lightning.errors import UserError

# diffusers clamps log-variances to this range before it takes their exponential.
_LOG_VARIANCE_RANGE = (-30.0, 20.0)


class AutoencoderNetwork(nn.Module):
    """The encoder and decoder of an AutoencoderKL with the interface that a training step uses.

    Args:
        vae: the diffusers model.
        train_encoder: False freezes the encoder (with its 1×1 convolution) and trains only the decoder.
    """

    def __init__(self, vae: AutoencoderKL, *, train_encoder: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels = int(vae.config.latent_channels)
        self.train_encoder = train_encoder
        for half in (vae.encoder, vae.quant_conv):
            if half is not None:
                half.requires_grad_(train_encoder)

    def posterior(self, image: Tensor) -> Posterior:
        """Return the distribution of raw latents of images in [-1, 1]."""
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            moments = self.vae.encoder(image)
            if self.vae.quant_conv is not None:
                moments = self.vae.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*_LOG_VARIANCE_RANGE))

    def decode(self, latent: Tensor) -> Tensor:
        """Return the images of raw latents, approximately in [-1, 1]; always float32."""
        if self.vae.post_quant_conv is not None:
            latent = self.vae.post_quant_conv(latent)
        return self.vae.decoder(latent).float()

    def last_layer(self) -> nn.Parameter:
        """Return the weight of the decoder's last convolution, where the adaptive weight compares gradients."""
        return self.vae.decoder.conv_out.weight


def build_vae(config: Mapping[str, Any], *, initial_log_variance: float = -5.0) -> AutoencoderKL:
    """Return a new AutoencoderKL with random weights from its diffusers configuration.

    Args:
        config: fields of a diffusers AutoencoderKL.
        initial_log_variance: initial log-variance of the posterior. Every residual branch starts at zero, so the
            network starts as its chain of resampling convolutions; both make the first steps more effective.

    Raises:
        UserError: diffusers rejects a key or a value.
    """
    import diffusers  # noqa: PLC0415 (seconds to import)
    from diffusers.models.resnet import ResnetBlock2D  # noqa: PLC0415 (seconds to import)

    try:
        vae: AutoencoderKL = diffusers.AutoencoderKL(**config)
    except (TypeError, ValueError) as error:
        raise UserError(
            str(error), where="autoencoder.config", hint="use the keys of a diffusers AutoencoderKL"
        ) from error
    for block in vae.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    with torch.no_grad():
        last.bias[vae.config.latent_channels :] = initial_log_variance
    return vae


def load_vae(source: str) -> AutoencoderKL:
    """Load the AutoencoderKL of a diffusers folder or a hub name, in float32.

    Raises:
        UserError: there is no readable AutoencoderKL at `source`.
    """
    where = "autoencoder.source"
    return read_autoencoder(locate_autoencoder(source, where=where), torch.float32, where=where)


def save_vae(vae: AutoencoderKL, folder: Path, statistics: tuple[Sequence[float], Sequence[float]] | None) -> None:
    """Write a diffusers folder whose config contains the normalization of the latents.

    Args:
        vae: the model.
        folder: the folder to write.
        statistics: mean and standard deviation per channel. The scaling factor is then set to 1 and the shift to
            None, because (z − mean) / std is the whole normalization. None leaves the config unchanged.
    """
    if statistics is not None:
        mean, std = ([float(value) for value in each] for each in statistics)
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    write_autoencoder(vae, folder)
