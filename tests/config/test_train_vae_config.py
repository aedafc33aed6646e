"""Every preset of hdm-train-vae composes and passes the typed check; published numbers stand where they should."""

import json
from dataclasses import asdict
from pathlib import Path

import hdm_lightning.conf
import pytest
from hdm_lightning.training.vae.checks import branch_settings, check_vae_settings, plan_vae, vae_settings_from
from hdm_lightning.training.vae.settings import VaeTrainSettings
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from hdm_lightning.autoencoding.branches import BranchSettings
from hdm_lightning.cli.hydra_app import short_name
from hdm_lightning.errors import UserError

CONF = Path(hdm_lightning.conf.__file__).parent
PRESETS = sorted(path.stem for path in (CONF / "vae_training").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("eqvae_*.yaml"))
WITHOUT_TORCHVISION = "loss.perceptual_network=efficientnet_lite0"


def settings_of(*overrides):
    OmegaConf.register_new_resolver("hdm.short", short_name, replace=True)
    with initialize_config_module("hdm_lightning.conf", version_base="1.3"):
        config = compose("train_vae", overrides=["data.train=shards", *overrides])
    return vae_settings_from(config)


@pytest.mark.parametrize("override", [f"vae_training={name}" for name in PRESETS])
def test_every_preset_passes_every_check(override):
    settings = settings_of(override, WITHOUT_TORCHVISION)
    factor = (
        8 if settings.autoencoder.config is None else 2 ** (len(settings.autoencoder.config["block_out_channels"]) - 1)
    )
    check_vae_settings(settings, factor)
    assert plan_vae(settings, world_size=1).steps > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_its_preset_on_four_devices(name):
    settings, preset = settings_of(f"experiment={name}"), settings_of(f"vae_training={name}")
    assert (settings.name, settings.trainer.devices) == (name, 4)
    assert settings.stage == preset.stage and settings.adversarial == preset.adversarial
    assert plan_vae(settings, world_size=4).accumulation == 1


def test_the_defaults_of_the_file_are_those_of_the_dataclasses():
    file = settings_of("~vae_training", "stage.resolution=64", "stage.samples=1", "stage.batch_size=1",
                       "stage.micro_batch_size=1", "stage.learning_rate=1")  # fmt: skip
    for group in ("loss", "equivariance", "adversarial", "patches", "checkpoints", "logger"):
        default = VaeTrainSettings.__dataclass_fields__[group].default_factory()
        assert json.dumps(asdict(getattr(file, group))) == json.dumps(asdict(default)), group


def test_the_papers_numbers():
    settings = settings_of("vae_training=eqvae_paper")
    assert branch_settings(settings) == BranchSettings()
    assert (settings.stage.resolution, tuple(settings.stage.betas)) == (256, (0.5, 0.9))
    loss, adversarial = settings.loss, settings.adversarial
    assert (loss.pixel, loss.perceptual_weight, loss.kl_weight) == ("l1", 1.0, 1e-6)
    found = (adversarial.weight, adversarial.adaptive, adversarial.adaptive_largest, adversarial.channels)
    assert found == (0.5, True, 1e4, 64)
    assert (adversarial.layers, tuple(adversarial.betas)) == (3, (0.5, 0.9))


def test_the_anime_variants_numbers():
    settings = settings_of("vae_training=eqvae_sdxl_anime")
    assert branch_settings(settings) == BranchSettings.anime()
    assert settings.adversarial.start_samples == 1000 * settings.stage.batch_size
    rates = (settings.stage.learning_rate, settings.adversarial.learning_rate)
    assert (*rates, tuple(settings.stage.betas), settings.stage.gradient_clip) == (2e-5, 5e-4, (0.9, 0.98), 0.1)
    assert settings.data["crop"]["flip"] is True


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("stage.resolution=big", "stage.resolution"),
        ("+stage.max_hours=2", "stage.max_hours"),
        ("loss.kl_weight=much", "loss.kl_weight"),
        ("+adversarial.start_step=4", "adversarial.start_step"),
    ],
)
def test_a_wrong_key_or_value_is_named(override, where):
    with pytest.raises(UserError) as caught:
        settings_of("vae_training=from_scratch_tiny", override)
    assert caught.value.where == where and caught.value.hint
