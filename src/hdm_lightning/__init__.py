"""Train a text-to-image model from scratch, at home (Home-made Diffusion Model, arXiv 2509.06068)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hdm_lightning.version import __version__

if TYPE_CHECKING:
    from hdm_lightning.data.datamodule import ShardDataModule
    from hdm_lightning.encoders.autoencoder import load_autoencoder
    from hdm_lightning.encoders.text import load_text_encoder
    from hdm_lightning.generation.pipeline import HDMPipeline
    from hdm_lightning.models import XUT, XUTConfig
    from hdm_lightning.training.modules.autoencoder_module import AutoencoderModule
    from hdm_lightning.training.modules.flow_module import FlowModule
    from hdm_lightning.training.modules.low_rank import LoRA
    from hdm_lightning.training.modules.lycoris import LyCORIS

__all__ = [
    "XUT",
    "AutoencoderModule",
    "FlowModule",
    "HDMPipeline",
    "LoRA",
    "LyCORIS",
    "ShardDataModule",
    "XUTConfig",
    "__version__",
    "load_autoencoder",
    "load_text_encoder",
]

_PLACES = {
    "AutoencoderModule": "hdm_lightning.training.modules.autoencoder_module",
    "FlowModule": "hdm_lightning.training.modules.flow_module",
    "HDMPipeline": "hdm_lightning.generation.pipeline",
    "LoRA": "hdm_lightning.training.modules.low_rank",
    "LyCORIS": "hdm_lightning.training.modules.lycoris",
    "ShardDataModule": "hdm_lightning.data.datamodule",
    "XUT": "hdm_lightning.models",
    "XUTConfig": "hdm_lightning.models",
    "load_autoencoder": "hdm_lightning.encoders.autoencoder",
    "load_text_encoder": "hdm_lightning.encoders.text",
}
"""Module that defines each public name, imported on first use: torch and Lightning take seconds to import."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
