"""The parts that a run is composed of, built from settings."""

from hdm_lightning.encoders.cache import CachedTextEncoder
from hdm_lightning.encoders.latent_cache import CachedAutoencoder
from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.encoders.vae import load_autoencoder
from hdm_lightning.encoders.whitening import TextWhitening, WhitenedTextEncoder
from hdm_lightning.training.hardware import encoder_dtype
from hdm_lightning.training.modules.frozen_encoders import FrozenEncoders
from hdm_lightning.training.settings import TrainSettings


def load_encoders(settings: TrainSettings, accelerator: str, whitening: TextWhitening | None = None) -> FrozenEncoders:
    """The frozen text encoder, its states made white if so wanted, and autoencoder, on the CPU."""
    text, vae = settings.text_encoder, settings.vae
    encoder = load_text_encoder(
        text.name,
        dtype=encoder_dtype(text.dtype, accelerator, "text_encoder.dtype"),
        layer=text.layer,
        max_tokens=text.max_tokens,
    )
    if whitening is not None:
        encoder = WhitenedTextEncoder(encoder, whitening)
    if text.cache_size:
        encoder = CachedTextEncoder(encoder, text.cache_size)
    dtype = encoder_dtype(vae.dtype, accelerator, "vae.dtype")
    autoencoder = load_autoencoder(vae.name, dtype=dtype, max_pixels=vae.max_pixels, mean=vae.mean, std=vae.std)
    cached = CachedAutoencoder(autoencoder, vae.cache_size) if vae.cache_size else autoencoder
    return FrozenEncoders(encoder, cached)
