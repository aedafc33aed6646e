"""Every preset of hdm-train-vae composes; published numbers stand where they should."""

from pathlib import Path

import hdm_lightning.conf
import pytest

from composed import of_hydra
from hdm_lightning.autoencoding.branches import BranchSettings
from hdm_lightning.errors import UserError
from hdm_lightning.training.autoencoder_checks import check_settings
from hdm_lightning.training.autoencoder_run import AutoencoderRecipe
from hdm_lightning.training.run_recipe import group, with_stage

CONF = Path(hdm_lightning.conf.__file__).parent
PRESETS = sorted(path.stem for path in (CONF / "vae_training").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment_vae").glob("*.yaml"))
WITHOUT_TORCHVISION = "loss.perceptual_network=efficientnet_lite0"
RECIPE = AutoencoderRecipe()


def composed(*overrides):
    return of_hydra("train_vae", "data.train=shards", *overrides)


def groups_of(config):
    """The plain groups and the stage."""
    return {name: group(config, RECIPE, name) for name in RECIPE.groups}, RECIPE.plans(config, 1)[0].settings


@pytest.mark.parametrize("override", [f"vae_training={name}" for name in PRESETS])
def test_every_preset_passes_every_check(override):
    config = composed(override, WITHOUT_TORCHVISION, "trainer=cpu")
    groups, _ = groups_of(config)
    fields = groups["autoencoder"].config
    factor = 8 if fields is None else 2 ** (len(fields["block_out_channels"]) - 1)
    (plan,) = RECIPE.plans(config, world_size=1)
    check_settings(groups, with_stage(config, plan, **RECIPE.stage_values(config, plan)), plan, factor)
    assert plan.steps > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_its_preset_on_four_devices(name):
    config, preset = composed(f"experiment_vae={name}"), composed(f"vae_training={name}")
    assert (config.name, config.trainer.devices, config.hardware.compile) == (name, 4, True)
    assert config.stage == preset.stage and config.adversarial == preset.adversarial
    assert RECIPE.plans(config, world_size=4)[0].accumulation == 1


def test_the_defaults_of_the_file_are_those_of_the_groups():
    file = composed("~vae_training")
    for name in ("loss", "equivariance", "adversarial", "patches", "autoencoder", "validation", "hardware"):
        assert group(file, RECIPE, name) == RECIPE.groups[name](), name


def test_the_papers_numbers():
    groups, stage = groups_of(composed("vae_training=eqvae_paper"))
    assert groups["equivariance"] == BranchSettings()
    assert (stage.resolution, tuple(stage.betas)) == (256, (0.5, 0.9))
    loss, adversarial = groups["loss"], groups["adversarial"]
    assert (loss.pixel, loss.perceptual_weight, loss.kl_weight) == ("l1", 1.0, 1e-6)
    found = (adversarial.weight, adversarial.adaptive, adversarial.adaptive_largest, adversarial.channels)
    assert found == (0.5, True, 1e4, 64)
    assert (adversarial.layers, tuple(adversarial.betas)) == (3, (0.5, 0.9))


def test_the_anime_variants_numbers():
    config = composed("vae_training=eqvae_sdxl_anime")
    groups, stage = groups_of(config)
    assert groups["equivariance"] == BranchSettings.anime()
    assert groups["adversarial"].start_samples == 1000 * stage.batch_size
    rates = (stage.learning_rate, groups["adversarial"].learning_rate)
    assert (*rates, tuple(stage.betas), stage.gradient_clip) == (2e-5, 5e-4, (0.9, 0.98), 0.1)
    assert config.data.crop.flip is True


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
        groups_of(composed("vae_training=from_scratch_tiny", override))
    assert caught.value.where == where and caught.value.hint
