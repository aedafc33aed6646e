"""A diffusers AutoencoderKL as a network in training: built, read, and written back with its latent statistics.

Shapes: image (B,3,f·H,f·W) in [-1, 1]; latent (B,C,H,W), raw, as the encoder gives it.
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
    """The two halves of an AutoencoderKL behind the names that a training step uses.

    Args:
        vae: the diffusers model.
        train_encoder: False freezes the encoder (with its 1×1 convolution) and trains the decoder alone.
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
        """Return images, about [-1, 1], of raw latents; float32 whatever the precision inside."""
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
        initial_log_variance: where the posterior's log-variances start. Every residual branch starts at zero, so
            that the network begins as its chain of resampling convolutions; both make the first steps count.

    Raises:
        UserError: diffusers does not know a key or refuses a value.
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
    """Return the AutoencoderKL of a diffusers folder or a hub name, in float32.

    Raises:
        UserError: nothing at `source` reads as an AutoencoderKL.
    """
    where = "autoencoder.source"
    return read_autoencoder(locate_autoencoder(source, where=where), torch.float32, where=where)


def save_vae(vae: AutoencoderKL, folder: Path, statistics: tuple[Sequence[float], Sequence[float]] | None) -> None:
    """Write a diffusers folder whose config states the normalisation of the latents.

    Args:
        vae: the model.
        folder: where to.
        statistics: mean and standard deviation per channel. The scaling factor is then set to 1 and the shift to
            none, because (z − mean) / std is the whole normalisation. None leaves what the config has.
    """
    if statistics is not None:
        mean, std = ([float(value) for value in each] for each in statistics)
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    write_autoencoder(vae, folder)
