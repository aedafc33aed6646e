"""The autoencoder's folder in the diffusers layout, with the latents' normalisation in its config.json.

Shapes: C latent channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hdm_lightning.encoders.autoencoder_folder import WEIGHTS
from hdm_lightning.interop.tensor_files import read_sharded, write_tensors
from hdm_lightning.whole_files import write_json


class VaeFiles(NamedTuple):
    """Tensors, config.json, and the normalisation that it tells, (1,C,1,1) each or None."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    mean: Tensor | None
    std: Tensor | None


def read_vae_folder(folder: Path, dtype: torch.dtype | None = None) -> VaeFiles:
    """An AutoencoderKL's folder; nothing if it is not there.

    Args:
        folder: with config.json and diffusion_pytorch_model.safetensors.
        dtype: of the normalisation; that of the tensors by default.
    """
    tensors = read_sharded(folder, WEIGHTS)
    if tensors is None:
        return VaeFiles({}, None, None, None)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    dtype = dtype or next(iter(tensors.values())).dtype
    mean, std = (_per_channel(config.get(key), dtype) for key in ("latents_mean", "latents_std"))
    return VaeFiles(tensors, config or None, mean, std)


def write_vae_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    mean: Tensor | None,
    std: Tensor | None,
) -> None:
    """Write what `read_vae_folder` reads and diffusers' ``AutoencoderKL.from_pretrained`` too.

    Mean and standard deviation are the whole normalisation, so the scaling factor, which diffusers applies on top of
    them, becomes 1.
    """
    written = {"_class_name": "AutoencoderKL", **config}
    for key, value in (("latents_mean", mean), ("latents_std", std)):
        if value is not None:
            written[key] = value.double().flatten().tolist()
    if mean is not None and std is not None:
        written |= {"scaling_factor": 1.0, "shift_factor": None}
    write_tensors(folder / f"{WEIGHTS}.safetensors", tensors)
    write_json(folder / "config.json", written)


def _per_channel(values: list[float] | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64).to(dtype).view(1, -1, 1, 1)
