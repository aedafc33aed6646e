"""A trained network with its autoencoder, text encoder and settings, independent of any file layout.

Shapes: C latent channels.
"""

import copy
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from hdm_lightning.interop import published
from hdm_lightning.interop.tensor_files import require_finite
from hdm_lightning.models import XUT

NETWORK_PREFIX, VAE_PREFIX, TEXT_PREFIX = "unet.model.", "vae.", "te."


@dataclass(frozen=True)
class Release:
    """The contents of a published file or of a folder of this project.

    Args:
        network: the network, in the dtype it is stored in.
        vae: the autoencoder's tensors under diffusers names; empty if there is none.
        vae_config: its config.json; None if the source has none.
        vae_mean: (1,C,1,1) normalization of latents, (z − mean)/std; None if the source has none.
        vae_std: (1,C,1,1).
        text_encoder: tensors of a text encoder, named as after ``te.``; empty if there is none.
        settings: `training`, `sampling` and `text_encoder`, plain values, as far as they are known.
        left_out: names of tensors that belong to none of these.
        copies: prefixes of further copies of the network in the file.
    """

    network: XUT
    vae: Mapping[str, Tensor] = field(default_factory=dict)
    vae_config: Mapping[str, Any] | None = None
    vae_mean: Tensor | None = None
    vae_std: Tensor | None = None
    text_encoder: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()

    def cast(self, dtype: torch.dtype) -> Self:
        """Return a copy with all floating-point tensors in another dtype; the network is not shared with the original.

        Raises:
            ValueError: a value does not fit the dtype.
        """
        for tensors in (dict(self.network.named_parameters()), self.vae, self.text_encoder):
            _require_range(tensors, dtype)
        return replace(
            self,
            network=copy.deepcopy(self.network).to(dtype),
            vae=_cast(self.vae, dtype),
            vae_mean=None if self.vae_mean is None else self.vae_mean.to(dtype),
            vae_std=None if self.vae_std is None else self.vae_std.to(dtype),
            text_encoder=_cast(self.text_encoder, dtype),
        )


def release_from_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None) -> Release:
    """Build a release from the tensors of a published file, whose network may have any prefix.

    Raises:
        ValueError: there is no network, or its tensors are missing, unexpected, mis-shaped or not finite.
    """
    tensors = published.unwrapped(tensors)
    bare = published.strip_prefix(tensors)
    network = published.load_xut(published.infer_config(bare), bare)
    known = {f"{published.find_prefix(tensors)}{name}" for name in bare}
    return release_around(network, tensors, known, settings or {})


def release_around(
    network: XUT, tensors: Mapping[str, Tensor], known: Container[str], settings: Mapping[str, Any]
) -> Release:
    """Build a release from a network and its single file's tensors; `known` are the names of the network's own.

    Raises:
        ValueError: a tensor is not finite.
    """
    left_out = [n for n in tensors if n not in known and not n.startswith(published.BESIDE)]
    require_finite({name: tensor for name, tensor in tensors.items() if name not in left_out})
    return Release(
        network,
        vae=published.under(VAE_PREFIX, tensors),
        vae_mean=tensors.get("vae_mean"),
        vae_std=tensors.get("vae_std"),
        text_encoder=published.under(TEXT_PREFIX, tensors),
        settings=settings,
        left_out=tuple(left_out),
    )


def release_to_tensors(release: Release) -> dict[str, Tensor]:
    """Return all tensors in the published single-file layout; undoes `release_from_tensors` bit for bit.

    Raises ValueError: the network's wiring is not the published one.
    """
    published.require_published_wiring(release.network.config)
    tensors = {NETWORK_PREFIX + n: t for n, t in published.export_state_dict(release.network).items()}
    return tensors | tensors_beside(release)


def tensors_beside(release: Release) -> dict[str, Tensor]:
    """Return all tensors except the network's, under their names in single files."""
    tensors = {VAE_PREFIX + n: t for n, t in release.vae.items()}
    tensors |= {TEXT_PREFIX + n: t for n, t in release.text_encoder.items()}
    for name, value in (("vae_mean", release.vae_mean), ("vae_std", release.vae_std)):
        if value is not None:
            tensors[name] = value
    return tensors


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _require_range(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    floating = {n: t.detach() for n, t in tensors.items() if t.is_floating_point() and t.numel()}
    wider = {n: t for n, t in floating.items() if torch.finfo(t.dtype).max > largest}
    overflown = [name for name, tensor in wider.items() if tensor.abs().max() > largest]
    if overflown:
        raise ValueError(f"{overflown[:3]} has values too large for {dtype}; keep the dtype, or use bfloat16")
