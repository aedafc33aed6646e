"""The configuration of an XUT: one frozen dataclass, its checks, and the presets of conf/model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from typing import Any, Literal, get_args

import yaml

Residual = Literal["input", "normed"]
Skips = Literal["mirrored", "last", "none", "concatenation"]
PositionConvention = Literal["area", "long_side"]
RopeInit = Literal["spread_5pi", "spread_10pi", "all_pi"]

PRESETS = ("xut_tiny", "xut_demo", "xut_small", "xut_base", "xut_large", "published")
"""The networks of conf/model: two small ones, the three of arXiv 2509.06068, table 1, and the released one."""


def preset_fields(name: str, *, own: bool = False) -> dict[str, Any]:
    """Return the fields of an `XUTConfig` that a file of conf/model sets.

    Args:
        name: one of `PRESETS`.
        own: return only the fields that the file itself sets, not those of the preset it is based on.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}")
    text = (resources.files("hdm_lightning.conf") / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    bases = [base for base in written.pop("defaults", []) if base != "_self_" and not own]
    inherited = {key: value for base in bases for key, value in preset_fields(base).items()}
    return inherited | {key: value for key, value in written.items() if not key.startswith("_")}


PUBLISHED: Mapping[str, Any] = preset_fields("published", own=True)
"""The wiring of the released network, as overrides: ``XUTConfig.preset("xut_base", **PUBLISHED)``."""

WIRING = ("residual", "skips", "positions")
"""The fields that change what a network computes without showing in the shapes of its weights."""

_MINIMUM = {
    "channels": 1,
    "patch_size": 1,
    "width": 2,
    "mlp_width": 1,
    "heads": 1,
    "head_dim": 4,
    "context_width": 1,
    "depth": 1,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "blocks_before": 0,
    "blocks_after": 0,
}
LARGEST = 1 << 30
"""Largest value of a size: JSON may contain integers that are too large for torch."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "residual": get_args(Residual),
    "skips": get_args(Skips),
    "positions": get_args(PositionConvention),
    "rope_init": get_args(RopeInit),
}


@dataclass(frozen=True)
class XUTConfig:
    """Shape and wiring of a Cross-U-Transformer (arXiv 2509.06068); the defaults are XUT-base.

    Args:
        channels: latent channels C.
        patch_size: side p of a patch in latent cells.
        width: token width D, equal to ``heads * head_dim``.
        mlp_width: hidden width of the SwiGLU.
        heads: attention heads.
        head_dim: channels of a head, a multiple of 4 (pairs for y and for x).
        context_width: width of the text encoder's hidden states.
        depth: levels of the U.
        encoder_blocks: blocks per encoder level.
        decoder_blocks: blocks per decoder level; the first one reads an encoder level.
        blocks_before: full-sequence blocks before the routed U.
        blocks_after: full-sequence blocks after it.
        aspect_ratio: whether the network takes log(W/H) as an input.
        residual: what a sublayer's output is added to: its ``input``, or the ``normed`` and modulated
            input (the released network).
        skips: which encoder level decoder level d reads by cross-attention: the ``mirrored`` one (the paper's
            formula) or always the ``last`` one (the released network). Two baselines without it: ``none``, a plain
            transformer, and ``concatenation``, where each decoder level starts with a Linear(2D, D) of its tokens
            concatenated with those of the mirrored encoder level (the long skips of U-ViT, arXiv 2209.12152).
        positions: convention of `positions.token_positions`.
        rope_init: initial values of the learnable rotary frequencies: log-spaced from π to 5π or 10π over
            heads and channels, or ``all_pi`` (the released network, by mistake).

    Raises:
        ValueError: a field is out of range, or ``width`` is not ``heads * head_dim``.
    """

    channels: int = 4
    patch_size: int = 2
    width: int = 1024
    mlp_width: int = 3072
    heads: int = 16
    head_dim: int = 64
    context_width: int = 1024
    depth: int = 4
    encoder_blocks: int = 1
    decoder_blocks: int = 3
    blocks_before: int = 1
    blocks_after: int = 3
    aspect_ratio: bool = True
    residual: Residual = "input"
    skips: Skips = "mirrored"
    positions: PositionConvention = "area"
    rope_init: RopeInit = "spread_5pi"

    def __post_init__(self) -> None:
        for name, least in _MINIMUM.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}, at most {LARGEST}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        if self.head_dim % 4:
            raise ValueError(f"head_dim is {self.head_dim}; expected a multiple of 4")
        if self.width % 2 or self.width != self.heads * self.head_dim:
            raise ValueError(
                f"width is {self.width}; expected heads * head_dim = {self.heads} * {self.head_dim} = "
                f"{self.heads * self.head_dim}"
            )
        if not isinstance(self.aspect_ratio, bool):
            raise ValueError(f"aspect_ratio is {self.aspect_ratio!r}; expected true or false")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> XUTConfig:
        """Return one of `PRESETS`, with fields replaced.

        Raises:
            ValueError: there is no such preset or field, or a value is out of range.
        """
        return cls.from_json({**preset_fields(name), **overrides})

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> XUTConfig:
        """Return the configuration that `to_json` wrote; missing fields take their defaults.

        Raises:
            ValueError: a key is not a field, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(mapping) - known)
        if unknown:
            raise ValueError(f"unknown XUT fields {unknown}; expected some of {sorted(known)}")
        return cls(**mapping)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values, for a config.json."""
        return asdict(self)

    @property
    def reads_encoder(self) -> bool:
        """Whether the first block of each decoder level cross-attends to an encoder level."""
        return self.skips in ("mirrored", "last")

    @property
    def is_published_wiring(self) -> bool:
        """Whether the forward pass is that of the released network (initialization does not matter)."""
        return all(getattr(self, name) == PUBLISHED[name] for name in WIRING)
