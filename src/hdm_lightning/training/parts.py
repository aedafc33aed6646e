"""The parts that a run is composed of, built from settings."""

from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.encoders.caches import CachedTextEncoder
from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.encoders.whitening import TextWhitening, WhitenedTextEncoder
from hdm_lightning.training.modules.frozen_encoders import FrozenEncoders
from hdm_lightning.training.settings import TrainSettings


def load_encoders(settings: TrainSettings, whitening: TextWhitening | None = None) -> FrozenEncoders:
    """The frozen text encoder, its states made white if so wanted, and autoencoder, on the CPU."""
    text, vae = settings.text_encoder, settings.vae
    encoder = load_text_encoder(
        text.name,
        dtype=text.dtype,
        layer=text.layer,
        max_tokens=text.max_tokens,
    )
    if whitening is not None:
        encoder = WhitenedTextEncoder(encoder, whitening)
    if text.cache_size:
        encoder = CachedTextEncoder(encoder, text.cache_size)
    autoencoder = load_autoencoder(
        vae.name,
        dtype=vae.dtype,
        max_pixels=vae.max_pixels,
        cache_size=vae.cache_size,
        mean=vae.mean,
        std=vae.std,
    )
    return FrozenEncoders(encoder, autoencoder)
