"""How far an autoencoder is from commuting with geometric transforms, on the encoder's and the decoder's side.

Shapes: image (B,3,f·H,f·W) in [-1, 1]; latent (B,C,H,W), the posterior's mean.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Transform = Callable[[Tensor, int], Tensor]
"""τ(tensor, pixels per latent cell): the same transform of an image (f pixels per cell) and of a latent (1)."""
Encode = Callable[[Tensor], Tensor]
Decode = Callable[[Tensor], Tensor]


def encoder_error(encode: Encode, image: Tensor, transform: Transform, factor: int) -> Tensor:
    """Return ‖τE(x) − E(τx)‖ / ‖E(τx)‖ per sample (B,) (EQ-VAE, arXiv 2502.09509, section 3).

    Args:
        encode: image to posterior mean.
        image: x.
        transform: τ.
        factor: f.
    """
    moved_latent, latent_of_moved = transform(encode(image), 1), encode(transform(image, factor))
    return _norm(moved_latent - latent_of_moved) / _norm(latent_of_moved).clamp(min=1e-12)


def decoder_error(decode: Decode, latent: Tensor, transform: Transform, factor: int) -> Tensor:
    """Return ‖D(τz) − τD(z)‖ / ‖τD(z)‖ per sample (B,).

    Args:
        decode: latent to image.
        latent: z.
        transform: τ.
        factor: f.
    """
    image_of_moved, moved_image = decode(transform(latent, 1)), transform(decode(latent), factor)
    return _norm(image_of_moved - moved_image) / _norm(moved_image).clamp(min=1e-12)


def moved_psnr(encode: Encode, decode: Decode, image: Tensor, transform: Transform, factor: int) -> Tensor:
    """Return the PSNR in dB of D(τE(x)) against τx per sample (B,): how well a moved latent still decodes."""
    return psnr(decode(transform(encode(image), 1)), transform(image, factor))


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB per sample (B,) of images in [-1, 1]; 100 where they are equal."""
    error = (output.clamp(-1, 1) - target).div(2).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-10))


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1)
