"""A short training on drawings, with EQ-VAE's regularisation and without: what it brings and what it costs."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from composed import check_job, run_job
from hdm_lightning.autoencoding.transforms import measured_transforms
from hdm_lightning.data.rules import StreamConfig, sources_from
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.evaluation.image_sets import middle_crops, real_images
from hdm_lightning.metrics.autoencoder_quality import AutoencoderMeasures

DRAWINGS = Path(__file__).parents[2] / "data" / "openclipart-mini"
TRAINING = [str(DRAWINGS / f"openclipart-0000{number}.tar") for number in range(3)]
HELD_OUT = str(DRAWINGS / "openclipart-00003.tar")
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
PLAIN = {"equivariant": 0.0, "downscaled": 0.0}
SIZES = {
    64: {"samples": 4000, "patches": {"size_px": 32, "samples": 3504}, "numerators": [4, 5, 6, 7]},
    128: {"samples": 8000, "patches": {"size_px": 64, "samples": 7008}, "numerators": [2, 3, 4, 5, 6, 7]},
}
"""Side of the pictures in pixels, with what a short training at it takes."""


def measures(folder, side, equivariance, seed=0):
    size = SIZES[side]
    config = {
        "name": "drawings",
        "run_dir": str(folder),
        "seed": seed,
        "autoencoder": {"config": AUTOENCODER},
        "stage": {
            "resolution": side,
            "samples": size["samples"],
            "batch_size": 16,
            "micro_batch_size": 16,
            "learning_rate": 4e-3,
            "betas": [0.9, 0.98],
            "warmup_samples": 160,
            "final_learning_rate_ratio": 0.02,
        },
        "patches": size["patches"],
        "loss": {"pixel": "l2", "perceptual_network": None},
        "equivariance": {"scale_numerators": size["numerators"], "scale_denominator": 8, **equivariance},
        "data": {"train": TRAINING, "validation": HELD_OUT, "num_workers": 0, "memory_cache_gb": 0.5},
        "validation": {"samples": 64, "images": 0},
        "callbacks": {"progress": None, "weight_averages": {"halflife_samples": [200]}},
        "trainer": {"accelerator": "cpu"},
    }
    assert run_job(check_job(config)) == 0
    return json.loads((folder / "final" / "measures.json").read_text())["measures"]


def block_means(side):
    """Measures of an encoder that needs no training: the mean of every 4×4 pixels.

    It commutes with turns and with halving exactly; its error at other scales comes of sampling without antialias.
    """
    measures = AutoencoderMeasures(
        lambda image: (F.avg_pool2d(image, 4), torch.zeros(len(image), 3, side // 4, side // 4)),
        lambda latent: latent.repeat_interleave(4, -1).repeat_interleave(4, -2),
        channels=3,
        factor=4,
        transforms=measured_transforms(side // 4),
    )
    stream = middle_crops(StreamConfig(sources_from([HELD_OUT], "data"), side, 1, stage="validation"))
    for batch in real_images(stream, Plan(stream), 64):
        measures.update(batch.images / 127.5 - 1)
    return measures.report()


# Rounding differs between machines and thread counts, and hundreds of steps carry it far: the bounds are those that
# held with margin over several seeds, which experiments/eqvae_openclipart has with their spread.


@pytest.mark.slow
def test_the_regularisation_halves_the_errors_of_turns_at_two_decibels(tmp_path):
    """Measured with the seeds 0 and 1 after 4,000 samples: rotation 0.42, 0.67 -> 0.14, 0.14 for 19.6, 19.7 -> 18.3 dB.

    Scaling goes 0.34, 0.49 -> 0.25, 0.30: at 1/4 it keeps most of its error, as without antialias it reads a quarter of
    the cells and pixels of all of them. Block means have 0.25 there. What the training can act on, the error above that
    of block means, falls by more.
    """
    plain = measures(tmp_path / "plain", 64, PLAIN)
    regular = measures(tmp_path / "eq", 64, {"equivariant": 0.5, "downscaled": 0.125})
    blocks = block_means(64)
    for name in ("encoder_rotation", "encoder_rotation_centred", "decoder_rotation"):
        assert regular[f"equivariance/{name}"] <= 0.5 * plain[f"equivariance/{name}"]
    assert blocks["equivariance/encoder_rotation"] < 1e-6 and blocks["equivariance/encoder_scale_0.50"] < 1e-6
    assert regular["equivariance/encoder_scale"] <= 0.85 * plain["equivariance/encoder_scale"]
    above = [each["equivariance/encoder_scale"] - blocks["equivariance/encoder_scale"] for each in (plain, regular)]
    assert 0 < above[1] <= 0.7 * above[0]
    assert regular["equivariance/psnr_db_rotation"] > plain["equivariance/psnr_db_rotation"] + 1.0
    assert regular["reconstruction/psnr_db"] > plain["reconstruction/psnr_db"] - 2.5


def mean_over_seeds(folder, side, equivariance, seeds):
    every = [measures(folder / str(seed), side, equivariance, seed) for seed in seeds]
    return {name: sum(each[name] for each in every) / len(every) for name in every[0]}


@pytest.mark.slow
def test_with_antialias_the_regularisation_halves_the_errors_of_turns_and_of_scaling_at_two_decibels(tmp_path):
    """8,000 samples at 128 px, half of the steps equivariant; experiments/eqvae_openclipart has three seeds of it."""
    plain = mean_over_seeds(tmp_path / "plain", 128, PLAIN, seeds=(0, 1))
    antialiased = {"equivariant": 0.5, "downscaled": 0.125, "antialias": True}
    regular = mean_over_seeds(tmp_path / "eq", 128, antialiased, seeds=(0, 1))
    blocks = block_means(128)
    for group in ("encoder_rotation", "encoder_scale_antialiased"):
        for name in (group, f"{group}_centred"):
            assert regular[f"equivariance/{name}"] <= 0.5 * plain[f"equivariance/{name}"]
    assert regular["equivariance/psnr_db_scale_antialiased"] > plain["equivariance/psnr_db_scale_antialiased"] + 0.5
    assert regular["reconstruction/psnr_db"] > plain["reconstruction/psnr_db"] - 3.0
    # Not by holding no more than an encoder that is equivariant for nothing.
    assert regular["reconstruction/psnr_db"] > blocks["reconstruction/psnr_db"] + 1.0
