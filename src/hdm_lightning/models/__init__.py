"""The networks: XUT, its blocks, positions, routing and counts, and the discriminator (pure torch)."""

from hdm_lightning.models.config import PUBLISHED, XUTConfig
from hdm_lightning.models.xut import XUT

__all__ = ["PUBLISHED", "XUT", "XUTConfig"]
