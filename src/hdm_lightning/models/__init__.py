"""The networks: XUT, with its blocks, positions and routing, and the discriminator (pure torch)."""

from hdm_lightning.models.config import PUBLISHED, XUTConfig
from hdm_lightning.models.xut import XUT

__all__ = ["PUBLISHED", "XUT", "XUTConfig"]
