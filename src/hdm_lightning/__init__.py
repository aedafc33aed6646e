"""Train a text-to-image model from scratch, at home (Home-made Diffusion Model, arXiv 2509.06068)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hdm_lightning.version import __version__

if TYPE_CHECKING:
    from hdm_lightning.encoders.autoencoder import load_autoencoder
    from hdm_lightning.encoders.text import load_text_encoder
    from hdm_lightning.generation.pipeline import HDMPipeline
    from hdm_lightning.models import XUT, XUTConfig

__all__ = ["XUT", "HDMPipeline", "XUTConfig", "__version__", "load_autoencoder", "load_text_encoder"]

# Read on first use: torch alone takes seconds.
_PLACES = {
    "HDMPipeline": "hdm_lightning.generation.pipeline",
    "XUT": "hdm_lightning.models",
    "XUTConfig": "hdm_lightning.models",
    "load_autoencoder": "hdm_lightning.encoders.autoencoder",
    "load_text_encoder": "hdm_lightning.encoders.text",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
