"""The single file that ComfyUI's HDM loader expects: network and autoencoder together.

A text encoder is loaded beside it there, so none is put in. The released files are in float16: cast the release
first to have the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from hdm_lightning.interop.release import Release, release_to_tensors


def comfyui_tensors(release: Release) -> dict[str, Tensor]:
    """The file's tensors: ``unet.model.``, ``vae.``, ``vae_mean`` and ``vae_std``.

    Raises:
        ValueError: the wiring is not the published one (the loader knows no other), or the autoencoder or its
            normalisation is missing.
    """
    lacking = [
        name
        for name, value in (("vae", release.vae), ("vae_mean", release.vae_mean), ("vae_std", release.vae_std))
        if _is_missing(value)
    ]
    if lacking:
        raise ValueError(f"the loader expects the autoencoder in the file, and {', '.join(lacking)} is missing")
    return release_to_tensors(replace(release, text_encoder={}))


def _is_missing(value: Mapping[str, Tensor] | Tensor | None) -> bool:
    return value is None or (not isinstance(value, Tensor) and not value)
