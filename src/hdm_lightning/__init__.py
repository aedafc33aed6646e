"""Train a text-to-image model from scratch, at home (Home-made Diffusion Model, arXiv 2509.06068)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hdm_lightning.version import __version__

if TYPE_CHECKING:
    from hdm_lightning.data.datamodule import ShardDataModule

_HOMES = {"ShardDataModule": "hdm_lightning.data.datamodule"}
"""Public name to the module it is defined in, which is imported at first use: torch and Lightning take seconds."""

__all__ = ["ShardDataModule", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
