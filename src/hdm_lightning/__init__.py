"""Train a text-to-image model from scratch, at home (Home-made Diffusion Model, arXiv 2509.06068)."""

from hdm_lightning.version import __version__

__all__ = ["__version__"]
