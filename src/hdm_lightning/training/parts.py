"""The parts that a run is composed of, built from settings."""

from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.encoders.vae import load_autoencoder
from hdm_lightning.training.frozen import FrozenEncoders
from hdm_lightning.training.hardware import encoder_dtype
from hdm_lightning.training.settings import TrainSettings


def load_encoders(settings: TrainSettings, accelerator: str) -> FrozenEncoders:
    """The frozen text encoder and autoencoder, on the CPU."""
    text, vae = settings.text_encoder, settings.vae
    return FrozenEncoders(
        load_text_encoder(
            text.name,
            dtype=encoder_dtype(text.dtype, accelerator, "text_encoder.dtype"),
            layer=text.layer,
            max_batch=text.max_batch,
            cache_size=text.cache_size,
        ),
        load_autoencoder(
            vae.name,
            dtype=encoder_dtype(vae.dtype, accelerator, "vae.dtype"),
            max_batch=vae.max_batch,
            mean=vae.mean,
            std=vae.std,
        ),
    )
