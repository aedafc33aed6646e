"""A PatchGAN discriminator (arXiv 1611.07004, section 3.2.2): classifies each patch as real or generated.

Shapes: image (B,3,H,W) in [-1, 1]; logits (B,1,h,w) with h = H/2^layers − 2.
"""

from typing import Literal, get_args

from torch import Tensor, nn

Norm = Literal["batch", "group", "none"]
NORMS = get_args(Norm)


def smallest_side(layers: int) -> int:
    """Return the smallest image side in pixels that still gives one patch."""
    return 3 * 2**layers


class PatchDiscriminator(nn.Module):
    """4×4 convolutions: `layers` of stride 2, then two of stride 1; channels double up to eightfold.

    Args:
        channels: channels of the first layer.
        layers: downsampling layers; 3 give a receptive field of 70×70 pixels.
        norm: `batch` as published (needs statistics synchronized over devices), `group` (independent of the batch), or
            `none`.

    Raises:
        ValueError: the norm is unknown, or `channels` or `layers` is below 1.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: Norm = "group") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm: got {norm!r}, expected one of {', '.join(NORMS)}")
        if layers < 1 or channels < 1:
            raise ValueError(f"layers, channels: got {layers} and {channels}, expected at least 1 each")
        widths = [channels * min(2**number, 8) for number in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for number in range(1, layers + 1):
            stride = 2 if number < layers else 1
            parts += [
                nn.Conv2d(widths[number - 1], widths[number], 4, stride, 1, bias=norm != "batch"),
                _norm(norm, widths[number]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B,1,h,w); positive means real."""
        return self.layers(image)


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        groups = max(groups for groups in range(1, min(32, channels) + 1) if channels % groups == 0)
        return nn.GroupNorm(groups, channels)
    return nn.Identity()


def _initialise(module: nn.Module) -> None:
    """Draw weights with standard deviation 0.02, as published; biases keep torch's initialization."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
