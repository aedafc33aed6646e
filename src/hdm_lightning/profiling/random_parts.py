"""The parts of a training step at their true sizes, with random weights: nothing is downloaded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from hdm_lightning.encoders.autoencoder import MAX_PIXELS, KLAutoencoder
from hdm_lightning.encoders.text import MAX_TOKENS, TransformersTextEncoder
from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.profiling.architectures import (
    GEMMA3_1B,
    GEMMA3_270M,
    QWEN3_0_6B,
    SDXL_AUTOENCODER,
    TINY_AUTOENCODER,
    TINY_TEXT,
)

_TINY = XUTConfig(
    width=64, mlp_width=192, heads=2, head_dim=32, context_width=32, depth=2, decoder_blocks=1, blocks_after=1
)


class Size(NamedTuple):
    """A network with the encoders it is trained with."""

    network: XUTConfig
    text: Mapping[str, Any]  # a transformers configuration
    autoencoder: Mapping[str, Any]  # a diffusers AutoencoderKL configuration
    resolution: int = 256  # of the images, where none is asked for


SIZES: Mapping[str, Size] = {
    "tiny": Size(_TINY, TINY_TEXT, TINY_AUTOENCODER, resolution=64),
    "xut_small": Size(XUTConfig.preset("xut_small"), GEMMA3_270M, SDXL_AUTOENCODER),
    "xut_base": Size(XUTConfig.preset("xut_base"), QWEN3_0_6B, SDXL_AUTOENCODER),
    "xut_large": Size(XUTConfig.preset("xut_large"), GEMMA3_1B, SDXL_AUTOENCODER),
}
"""The sizes of arXiv 2509.06068, table 1, with their text encoders, and one for quick runs."""


def size_of(name: str) -> Size:
    """The size of that name. Raises UserError: there is none."""
    if name not in SIZES:
        raise UserError(f"no size is called {name!r}", where="--size", hint=did_you_mean(name, SIZES))
    return SIZES[name]


def random_network(config: XUTConfig, *, seed: int = 0) -> XUT:
    """A network in which every part does its work: the zero-initialised outputs are filled as well."""
    with _seeded(seed):
        network = XUT(config)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return network


def random_text_encoder(
    config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, max_tokens: int = MAX_TOKENS
) -> TransformersTextEncoder:
    """A frozen language model of this configuration."""
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415 (seconds to import)

    with _seeded(0):
        model = AutoModel.from_config(AutoConfig.for_model(**config), dtype=dtype)
    return TransformersTextEncoder(model, max_tokens=max_tokens)


def random_autoencoder(
    config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, max_pixels: int = MAX_PIXELS
) -> KLAutoencoder:
    """A frozen autoencoder of this configuration, its latents not normalised."""
    from diffusers import AutoencoderKL  # noqa: PLC0415 (seconds to import)

    with _seeded(0):
        model: Any = AutoencoderKL(**config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    channels = int(config["latent_channels"])
    return KLAutoencoder(model, [0.0] * channels, [1.0] * channels, max_pixels=max_pixels)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of a seed inside, those of before again outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
