"""A short training on drawings, with EQ-VAE's regularisation and without: what it brings and what it costs."""

import json
from pathlib import Path

import pytest

from hdm_lightning.training.vae.job import check_vae_job, run_vae_job

DRAWINGS = Path(__file__).parents[2] / "data" / "openclipart-mini"
AUTOENCODER = {
    "block_out_channels": [20, 20, 20],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 0,
    "norm_num_groups": 5,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def measures(folder, equivariant, downscaled):
    config = {
        "name": "drawings",
        "run_dir": str(folder),
        "autoencoder": {"config": AUTOENCODER},
        "stage": {
            "resolution": 64,
            "samples": 4000,
            "batch_size": 16,
            "micro_batch_size": 16,
            "learning_rate": 4e-3,
            "betas": [0.9, 0.98],
            "warmup_samples": 160,
            "final_learning_rate_ratio": 0.02,
        },
        "patches": {"size_px": 32, "samples": 3504},
        "loss": {"pixel": "l2"},
        "equivariance": {
            "equivariant": equivariant,
            "downscaled": downscaled,
            "scale_numerators": [4, 5, 6, 7],
            "scale_denominator": 8,
        },
        "data": {"train": str(DRAWINGS), "workers": 0, "memory_cache_gb": 0.5},
        "validation": {"samples": 64, "pictures": 0},
        "ema": {"halflife_samples": [200]},
        "trainer": {"accelerator": "cpu"},
        "logger": {"progress_bar": False},
    }
    assert run_vae_job(check_vae_job(config)) == 0
    return json.loads((folder / "final" / "measures.json").read_text())["measures"]


@pytest.mark.slow
def test_the_regularisation_halves_the_rotation_error_at_two_decibels(tmp_path):
    """Measured with seed 0: rotation 0.51 -> 0.15, scale 0.37 -> 0.24, for 19.3 -> 17.8 dB after 4,000 samples."""
    plain = measures(tmp_path / "plain", 0.0, 0.0)
    regular = measures(tmp_path / "eq", 0.5, 0.125)
    assert regular["equivariance/encoder_rotation"] <= 0.5 * plain["equivariance/encoder_rotation"]
    assert regular["equivariance/encoder_rotation_centred"] <= 0.5 * plain["equivariance/encoder_rotation_centred"]
    assert regular["equivariance/decoder_rotation"] <= 0.5 * plain["equivariance/decoder_rotation"]
    assert regular["equivariance/encoder_scale"] <= 0.75 * plain["equivariance/encoder_scale"]
    assert regular["equivariance/psnr_db_rotation"] > plain["equivariance/psnr_db_rotation"] + 1.0
    assert regular["reconstruction/psnr_db"] > plain["reconstruction/psnr_db"] - 2.0
