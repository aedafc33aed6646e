"""A whole training run at toy size, as plain configuration."""

import copy

import pytest

from toy_run import run_config


@pytest.fixture(scope="session")
def toy_job(tiny_text_encoder, tiny_autoencoder, tiny_shards):
    """Function of a run's folder and of stages (name to changes of the toy stage) that gives its configuration."""

    def configuration(folder, **stages):
        stages = stages or {"px16": {}, "px24": {"resolution": 24, "batch_size": 16, "samples": 32}}
        return run_config(folder, tiny_text_encoder, tiny_autoencoder, tiny_shards, stages)

    return configuration


@pytest.fixture
def toy_vae_config(tmp_path, tiny_shards):
    """An autoencoder's training from scratch: three channels at half the side, 16 px, six steps."""
    return {
        "name": "toy-vae",
        "run_dir": str(tmp_path / "run"),
        "autoencoder": {
            "config": {
                "block_out_channels": [8, 8],
                "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2,
                "layers_per_block": 0,
                "latent_channels": 3,
                "norm_num_groups": 4,
                "mid_block_add_attention": False,
                "sample_size": 16,
            }
        },
        "stage": {
            "resolution": 16,
            "samples": 48,
            "batch_size": 8,
            "micro_batch_size": 8,
            "learning_rate": 2e-3,
            "betas": [0.5, 0.9],
            "gradient_clip": 0.0,
            "save_every": 16,
        },
        "loss": {"pixel": "l1", "perceptual_network": None, "kl_weight": 1e-2},
        "equivariance": {"scale_numerators": [4, 5, 6, 7], "scale_denominator": 8},
        "data": {"train": str(tiny_shards), "num_workers": 0, "lanes": 4, "window": 4},
        "validation": {"samples": 8, "batch_size": 4},
        "callbacks": {"progress": None, "weight_averages": {"halflife_samples": [16]}},
        "trainer": {"accelerator": "cpu", "log_every_n_steps": 2},
        "hardware": {"threads": 1},
    }


@pytest.fixture
def changed():
    """Function of a configuration and of groups (name to keys with values) that gives a copy with those replaced."""

    def with_groups(config, **groups):
        result = copy.deepcopy(config)
        for group, values in groups.items():
            result[group] = {**result.get(group, {}), **values} if isinstance(values, dict) else values
        return result

    return with_groups
