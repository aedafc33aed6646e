"""What encoding an image with a frozen AutoencoderKL costs, in closed form.

Shapes: H×W pixels, f spatial factor, C channels of a level.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Convolution = tuple[int, int, int, int]
"""Kernel, input channels, output channels, pixels per output cell along one side."""

# Bytes a residual block moves beside its convolutions, in copies of its sequence: each norm reads twice and writes
# once, each activation reads and writes, the sum reads two and writes one.
_RESIDUAL_PASSES = 2 * (3 + 2) + 3
# Copies of the widest level alive at once in a residual block: its input, its last product, their sum and the scaled
# sum; from the second block on the encoder also holds what it gave the first.
_PEAK_COPIES = 4


@dataclass(frozen=True)
class AutoencoderArchitecture:
    """The sizes of an AutoencoderKL.

    Attributes:
        widths: channels of each level, from full resolution down.
        residual_blocks: of each level of the encoder.
        latent_channels: of the latent.
        attention: whether the middle has a self-attention.
        quant: whether a 1×1 convolution follows the encoder.
        post_quant: whether one precedes the decoder.
        image_channels: of the image.
    """

    widths: tuple[int, ...]
    residual_blocks: int
    latent_channels: int
    attention: bool = True
    quant: bool = True
    post_quant: bool = True
    image_channels: int = 3

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AutoencoderArchitecture":
        """From a diffusers AutoencoderKL's ``config.json``.

        Raises:
            ValueError: a size is missing.
        """
        missing = [key for key in ("block_out_channels", "latent_channels") if key not in config]
        if missing:
            raise ValueError(f"config lacks {', '.join(missing)}; expected a diffusers AutoencoderKL's config.json")
        return cls(
            widths=tuple(int(width) for width in config["block_out_channels"]),
            residual_blocks=int(config.get("layers_per_block", 1)),
            latent_channels=int(config["latent_channels"]),
            attention=bool(config.get("mid_block_add_attention", True)),
            quant=bool(config.get("use_quant_conv", True)),
            post_quant=bool(config.get("use_post_quant_conv", True)),
            image_channels=int(config.get("in_channels", 3)),
        )

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def parameters(self) -> int:
        """Convolutions and attention of encoder and decoder; norms and biases are below a thousandth."""
        convolutions = (*self._encoder(), *self._decoder())
        total = sum(kernel**2 * inputs * outputs for kernel, inputs, outputs, _ in convolutions)
        return total + (8 * self.widths[-1] ** 2 if self.attention else 0)

    def encode_flops(self, height: int, width: int) -> int:
        """Operations of encoding one image."""
        return self._flops(self._encoder(), height, width)

    def decode_flops(self, height: int, width: int) -> int:
        """Operations of decoding one image of that size in pixels."""
        return self._flops(self._decoder(), height, width)

    def encode_traffic_bytes(self, height: int, width: int, element_bytes: int = 2) -> int:
        """Bytes moved between the convolutions of encoding one image."""
        elements = 0
        for level, channels in enumerate(self.widths):
            cells = (height >> level) * (width >> level)
            blocks = self.residual_blocks + (2 if level == len(self.widths) - 1 else 0)
            elements += blocks * _RESIDUAL_PASSES * channels * cells
        return elements * element_bytes

    def encode_peak_bytes(self, height: int, width: int, element_bytes: int = 2) -> int:
        """Most bytes of one image alive at once without gradients."""
        levels = [channels * (height >> level) * (width >> level) for level, channels in enumerate(self.widths)]
        copies = _PEAK_COPIES + (1 if self.residual_blocks > 1 else 0)
        return copies * max(levels) * element_bytes

    def latent_values(self, height: int, width: int) -> int:
        """Numbers in one latent."""
        return self.latent_channels * (height // self.factor) * (width // self.factor)

    def _flops(self, convolutions: Iterable[Convolution], height: int, width: int) -> int:
        total = 0
        for kernel, inputs, outputs, scale in convolutions:
            total += 2 * kernel**2 * inputs * outputs * (height // scale) * (width // scale)
        if self.attention:
            cells, channels = (height // self.factor) * (width // self.factor), self.widths[-1]
            total += 2 * cells * 4 * channels**2 + 4 * cells**2 * channels
        return total

    def _encoder(self) -> Iterator[Convolution]:
        """Levels from full resolution down, the middle, the moments."""
        yield 3, self.image_channels, self.widths[0], 1
        inputs = self.widths[0]
        for level, outputs in enumerate(self.widths):
            for _ in range(self.residual_blocks):
                yield from _residual(inputs, outputs, 2**level)
                inputs = outputs
            if level < len(self.widths) - 1:
                yield 3, inputs, outputs, 2 ** (level + 1)
                inputs = outputs
        yield from (*_residual(inputs, inputs, self.factor), *_residual(inputs, inputs, self.factor))
        moments = 2 * self.latent_channels
        yield 3, inputs, moments, self.factor
        if self.quant:
            yield 1, moments, moments, self.factor

    def _decoder(self) -> Iterator[Convolution]:
        """The mirrored way, with one residual block more a level."""
        widths, inputs = tuple(reversed(self.widths)), self.widths[-1]
        if self.post_quant:
            yield 1, self.latent_channels, self.latent_channels, self.factor
        yield 3, self.latent_channels, inputs, self.factor
        yield from (*_residual(inputs, inputs, self.factor), *_residual(inputs, inputs, self.factor))
        for level, outputs in enumerate(widths):
            scale = self.factor >> level
            for _ in range(self.residual_blocks + 1):
                yield from _residual(inputs, outputs, scale)
                inputs = outputs
            if level < len(widths) - 1:
                yield 3, outputs, outputs, scale // 2
        yield 3, inputs, self.image_channels, 1


def _residual(inputs: int, outputs: int, scale: int) -> Iterator[Convolution]:
    yield 3, inputs, outputs, scale
    yield 3, outputs, outputs, scale
    if inputs != outputs:
        yield 1, inputs, outputs, scale
