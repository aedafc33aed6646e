"""Moved to `training.modules.autoencoder_network`."""

from hdm_lightning.training.modules.autoencoder_network import AutoencoderNetwork, build_vae, load_vae, save_vae

__all__ = ["AutoencoderNetwork", "build_vae", "load_vae", "save_vae"]
