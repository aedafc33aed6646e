"""Check that this ComfyUI and the installed hdm-lightning have what the nodes use; imports nothing slow."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

OLDEST_TRIED = (0, 3, 64)
"""Oldest version of ComfyUI tried. An older one that has all of `NEEDED` is used with a warning."""
NEEDED: Mapping[str, Sequence[str]] = {
    "comfy.model_base": ("BaseModel", "ModelType"),
    "comfy.model_patcher": ("ModelPatcher",),
    "comfy.model_sampling": ("CONST", "ModelSamplingDiscreteFlow"),
    "comfy.patcher_extension": ("WrappersMP",),
    "comfy.conds": ("CONDRegular",),
    "comfy.samplers": ("KSAMPLER", "calc_cond_batch"),
    "comfy.sd": ("CLIP", "VAE", "load_lora_for_models"),
    "node_helpers": ("conditioning_set_values",),
}
_SINGLE_FILE = "hdm_lightning.interop.single_file"


def require_comfyui(needed: Mapping[str, Sequence[str]] = NEEDED) -> None:
    """Raise ImportError, with the version found and the oldest tried, unless this ComfyUI has what the nodes use."""
    missing = [f"{module}.{name}" for module, names in needed.items() for name in _missing(module, names)]
    found, oldest = comfyui_version(), ".".join(map(str, OLDEST_TRIED))
    if missing:
        raise ImportError(
            f"hdm-lightning's nodes: this ComfyUI ({found or 'unknown version'}) is too old or too new for them: it "
            f"has no {', '.join(missing)}. They were tried with {oldest}: update ComfyUI to that or a later version."
        )
    if found is not None and numbers(found) < OLDEST_TRIED:
        logging.warning(
            f"hdm-lightning's nodes: ComfyUI {found} is older than {oldest}, the oldest they were tried with"
        )


def require_hdm_lightning() -> None:
    """Raise ImportError unless hdm-lightning is installed in ComfyUI's Python, as new as these nodes."""
    try:
        found = version("hdm-lightning")
    except PackageNotFoundError:
        raise ImportError(
            "hdm-lightning's nodes need the package: run pip install . in its repository, with ComfyUI's Python"
        ) from None
    if find_spec(_SINGLE_FILE) is None:
        raise ImportError(f"hdm-lightning {found} is older than these nodes: run pip install . in its repository")


def comfyui_version() -> str | None:
    """Return the version of the running ComfyUI; None if unknown."""
    try:
        return str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):
        return None


def numbers(text: str) -> tuple[int, ...]:
    """Return the first three numbers of a version, for comparisons."""
    parts = text.split(".")
    return tuple(int(part) for part in parts if part.isdigit())[:3]


def _missing(module: str, names: Sequence[str]) -> list[str]:
    try:
        found = importlib.import_module(module)
    except ImportError:
        return list(names)
    return [name for name in names if not hasattr(found, name)]
