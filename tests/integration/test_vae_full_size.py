"""The autoencoder of SDXL's size: one adversarial equivariance step, and what it takes."""

import io
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from composed import check_job, end_of, run_job
from shard_writer import ShardWriter

SDXL = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
PARAMETERS = 83_653_863


@pytest.fixture
def two_pictures(tmp_path):
    folder = tmp_path / "shards"
    generator = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for number in range(2):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
            writer.write(f"{number}", {"png": file.getvalue(), "txt": "noise"})
    return folder


@pytest.fixture
def random_autoencoder(tmp_path):
    folder = tmp_path / "autoencoder"
    torch.manual_seed(0)
    AutoencoderKL(**SDXL).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_one_adversarial_step_at_the_size_of_sdxl(tmp_path, two_pictures, random_autoencoder):
    config = {
        "name": "sdxl-size",
        "run_dir": str(tmp_path / "run"),
        "autoencoder": {"source": str(random_autoencoder)},
        "stage": {
            "resolution": 64,
            "samples": 2,
            "batch_size": 2,
            "micro_batch_size": 1,
            "learning_rate": 1e-5,
            "gradient_clip": 0.1,
        },
        "loss": {"perceptual_network": "efficientnet_lite0", "kl_weight": 1e-6},
        "equivariance": {"equivariant": 1.0, "downscaled": 0.0, "scale_numerators": [16, 24, 28]},
        "adversarial": {"weight": 0.5, "layers": 3},
        "data": {"train": str(two_pictures), "num_workers": 0, "lanes": 1},
        "validation": {"samples": 1, "batch_size": 1, "images": 0},
        "trainer": {"accelerator": "cpu"},
    }
    assert run_job(check_job(config)) == 0
    checkpoint = end_of(config, "01-vae")
    weights = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("network.")}
    assert sum(value.numel() for value in weights.values()) == PARAMETERS
    assert all(bool(torch.isfinite(value).all()) for value in checkpoint["state_dict"].values())
    for states in checkpoint["optimizer_states"]:
        moments = [state["exp_avg"].abs().max() for state in states["state"].values()]
        # The softmax of the middle's two attentions does not see the keys' biases.
        assert sum(moment == 0 for moment in moments) <= 2
    measures = json.loads(Path(config["run_dir"], "final", "measures.json").read_text())["measures"]
    assert measures["equivariance/encoder_rotation"] > 0
    # Weights, gradients, two moments, average, its checkpoint copy: 6 × 0.33 GB; then activations and libraries.
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    assert peak_gb < 8
