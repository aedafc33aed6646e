"""An AutoencoderKL from bare tensors under diffusers names, its shape read off them.

Single-file checkpoints carry an autoencoder this way, without its config.json.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.encoders.vae import MAX_PIXELS, KLAutoencoder

# What the tensors do not tell; the same in every Stable Diffusion autoencoder.
NORM_GROUPS = 32


def autoencoder_from_tensors(
    tensors: Mapping[str, Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    max_pixels: int = MAX_PIXELS,
) -> KLAutoencoder:
    """Build a frozen autoencoder around tensors.

    Args:
        tensors: names as in a diffusers AutoencoderKL, without prefix.
        mean, std: normalisation per latent channel.
        config: its config.json, where the file has one; None reads the shape off the tensors.
        dtype: dtype of the weights and of the computation.
        max_pixels: of the images encoded or decoded at once, together; one image always is.

    Raises:
        ValueError: if the tensors are not those of an AutoencoderKL.
    """
    from diffusers import AutoencoderKL  # noqa: PLC0415  (seconds to import)

    written = infer_config(tensors) if config is None else dict(config)
    with torch.device("meta"):
        model: Any = AutoencoderKL.from_config(written)
    try:
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"tensors: not those of an AutoencoderKL ({str(error)[:300]})") from error
    return KLAutoencoder(model, mean, std, max_pixels=max_pixels)


def infer_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor arguments of the AutoencoderKL that has these tensors.

    Raises:
        ValueError: if a tensor that every AutoencoderKL has is missing, or one that tells its shape.
    """
    if "encoder.conv_out.weight" not in tensors or "decoder.conv_in.weight" not in tensors:
        raise ValueError("tensors: no encoder.conv_out.weight or decoder.conv_in.weight, expected an AutoencoderKL")
    levels = _count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    tell = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)]
    missing = [name for name in tell if name not in tensors]
    if missing:
        raise ValueError(f"tensors: no {missing[0]}; the shape of an AutoencoderKL like that needs its config.json")
    widths = [tensors[name].shape[0] for name in tell]
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(widths),
        "layers_per_block": _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": min(NORM_GROUPS, widths[0]),
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": any(".mid_block.attentions." in name for name in tensors),
    }


def _count(names: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in names)
    return len({match.group(1) for match in found if match})
