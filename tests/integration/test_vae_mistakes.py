"""Mistakes in an autoencoder's training: named before anything is built, or stopped before anything is spoilt."""

from functools import partial
from pathlib import Path

import pytest

from composed import check_job, run_job
from hdm_lightning.errors import UserError

ADVERSARIAL = {"weight": 0.5, "start_samples": 16, "channels": 4, "layers": 1, "gradient_clip": 0.0}


@pytest.fixture
def config(toy_vae_config):
    return toy_vae_config


@pytest.mark.parametrize("adversarial", [False, True], ids=["plain", "adversarial"])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(config, adversarial, changed):
    """A rate beyond float32 breaks the weights in the first step, whose own loss is finite."""
    if adversarial:
        config = changed(config, adversarial=ADVERSARIAL | {"start_samples": 0, "learning_rate": 1e39})
    else:
        config = changed(config, stage={"learning_rate": 1e39})
    with pytest.raises(UserError, match="weights are not finite after step 1") as caught:
        run_job(check_job(changed(config, stage={"samples": 8})))
    assert "learning_rate" in caught.value.hint
    assert not list(Path(config["run_dir"]).rglob("*.ckpt"))
    assert not (Path(config["run_dir"]) / "final").exists()


def test_a_discriminator_that_is_not_finite_stops_the_run_before_it_reaches_the_autoencoder(config, changed):
    adversarial = ADVERSARIAL | {"start_samples": 0, "learning_rate": 1e39}
    with pytest.raises(UserError, match="weights are not finite after step 1; suspect samples: "):
        run_job(check_job(changed(config, adversarial=adversarial, stage={"save_every": 0})))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(config, changed):
    # The rate makes the weights overflow in the first step; the second sees it.
    config = changed(config, stage={"learning_rate": 1e30})
    with pytest.raises(
        UserError, match=r"weights are not finite after step \d; suspect samples: .*\.tar/\d{5}"
    ) as caught:
        run_job(check_job(config))
    assert "learning_rate" in caught.value.hint


@pytest.mark.parametrize(
    ("groups", "where"),
    [
        ({"autoencoder": {"config": None}}, "autoencoder"),
        ({"autoencoder": {"source": "some/where"}}, "autoencoder"),
        ({"autoencoder": {"config": None, "source": "/nowhere"}}, "autoencoder.source"),
        ({"autoencoder": {"config": {"latent_channels": 4}}}, "autoencoder.config.block_out_channels"),
        ({"autoencoder": {"config": {"block_out_channels": [8, 8], "norm_groups": 4}}}, "autoencoder.config"),
        ({"autoencoder": {"config": {"block_out_channels": [8, 8], "norm_num_groups": 3}}}, "autoencoder.config"),
        ({"autoencoder": {"config": {"block_out_channels": [8, 8, 8], "norm_num_groups": 4}}}, "autoencoder.config"),
        ({"stage": {"resolution": 17}}, "stage.resolution"),
        ({"stage": {"resolution": 4}}, "stage.resolution"),
        ({"stage": {"batch_size": 12}}, "stage.batch_size"),
        ({"stage": {"betas": [0.5, 1.0]}}, "stage.betas"),
        ({"stage": {"resolution": 14}}, "equivariance.scale_numerators"),
        ({"equivariance": {"equivariant": 0.9, "downscaled": 0.2}}, "equivariance"),
        ({"equivariance": {"scale_numerators": [3], "scale_denominator": 16}}, "equivariance.scale_numerators"),
        ({"equivariance": {"downscaled": 0.5, "scale_numerators": []}}, "equivariance"),
        ({"equivariance": {"downscaled": 0.5, "scale_numerators": [8]}}, "equivariance"),
        (
            {
                "equivariance": {
                    "downscaled": 0,
                    "scale_numerators": [3, 16],
                    "scale_denominator": 16,
                    "quarter_turns": [],
                }
            },
            "equivariance.scale_numerators",
        ),
        ({"loss": {"pixel_weight": 0}}, "loss.pixel_weight"),
        ({"loss": {"kl_weight": float("inf")}}, "loss.kl_weight"),
        ({"autoencoder": {"initial_log_variance": float("nan")}}, "autoencoder.initial_log_variance"),
        ({"data": {"crop": "centre"}}, "data.crop"),
        ({"data": {"captions": "all"}}, "data.captions"),
        ({"loss": {"pixel": "l3"}}, "loss.pixel"),
        ({"loss": {"kl_weight": -1}}, "loss.kl_weight"),
        ({"loss": {"perceptual_network": "vgg"}}, "loss.perceptual_network"),
        ({"adversarial": {"weight": -1}}, "adversarial.weight"),
        ({"adversarial": {"weight": 1, "norm": "layer"}}, "adversarial.norm"),
        ({"adversarial": {"weight": 1, "layers": 3}}, "adversarial.layers"),
        ({"adversarial": ADVERSARIAL | {"layers": 0}}, "adversarial.layers"),
        ({"adversarial": ADVERSARIAL | {"channels": 0}}, "adversarial.channels"),
        ({"adversarial": ADVERSARIAL | {"learning_rate": 0}}, "adversarial.learning_rate"),
        ({"adversarial": ADVERSARIAL | {"gradient_clip": -1}}, "adversarial.gradient_clip"),
        ({"adversarial": ADVERSARIAL | {"betas": [0.5, 1.0]}}, "adversarial.betas"),
        ({"adversarial": ADVERSARIAL | {"start_samples": 48}}, "adversarial.start_samples"),
        ({"equivariance": {"scale_numerators": [4, 9]}}, "equivariance"),
        ({"equivariance": {"scale_numerators": [8], "quarter_turns": [4]}}, "equivariance"),
        ({"patches": {"size_px": 8, "samples": -1}}, "patches.samples"),
        ({"trainer": {"static_graph": True}}, "trainer.static_graph"),
        ({"callbacks": {"weight_averages": {"sigma_rel": [0.05]}}}, "callbacks.weight_averages.sigma_rel"),
        ({"validation": {"batch_size": 0}}, "validation.batch_size"),
        ({"validation": {"perceptual_network": "vgg"}}, "validation.perceptual_network"),
        ({"adversarial": ADVERSARIAL, "trainer": {"precision": "16-mixed"}}, "trainer.precision"),
        ({"trainer": {"strategy": "fsdp2"}}, "trainer.strategy"),
        ({"hardware": {"overlap_encoders": True}}, "hardware.overlap_encoders"),
        ({"patches": {"size_px": 7, "samples": 8}}, "patches.size_px"),
        ({"patches": {"size_px": 32, "samples": 8}}, "patches.size_px"),
        ({"validation": {"samples": 0}}, "validation.samples"),
        ({"data": {"crop": {"buckets": {"step_px": 16}}}}, "data.crop.buckets"),
        ({"data": {"train": "/nowhere"}}, None),
        ({"stages": {}}, "stages"),
    ],
)
def test_mistakes_are_named_before_anything_is_built(config, groups, where, changed):
    with pytest.raises(UserError) as caught:
        check_job(changed(config, **groups))
    if where is not None:
        assert caught.value.where == where
    assert caught.value.hint


def test_the_check_fetches_no_more_than_training_reads(config, monkeypatch, changed):
    asked = []

    def refuse(repo_id, **options):
        asked.append(options["allow_patterns"])
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match="no network"):
        check_job(changed(config, autoencoder={"config": None, "source": "some/autoencoder"}))
    assert asked == [["config.json", "diffusion_pytorch_model.safetensors"]] * 2


def test_a_config_that_is_no_json_is_named(config, tmp_path, changed):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "broken" / "x.safetensors").touch()
    with pytest.raises(UserError, match="is not a JSON object") as caught:
        check_job(changed(config, autoencoder={"config": None, "source": str(tmp_path / "broken")}))
    assert caught.value.where.endswith("config.json")


@pytest.mark.parametrize(
    ("loss", "reported", "refused"),
    [
        ({"perceptual_network": "lpips_vgg"}, None, ("loss", "as small as 8 px, but lpips_vgg needs 16 px")),
        ({"perceptual_network": "lpips_vgg", "perceptual_weight": 0.0}, None, None),  # the report sees whole images
        ({"perceptual_network": "lpips_alex", "perceptual_weight": 0.0}, None, ("loss", "small as 16 px.* 31 px")),
        ({"perceptual_network": None}, "lpips_alex", ("validation", "small as 16 px, but lpips_alex needs 31 px")),
        ({"perceptual_network": None}, "lpips_vgg", None),
    ],
)
def test_pictures_that_are_too_small_for_the_perceptual_network_are_refused(
    config, monkeypatch, changed, loss, reported, refused
):
    monkeypatch.setattr("hdm_lightning.training.autoencoder_checks.require_perceptual", lambda name, where=None: None)
    check = partial(check_job, changed(config, loss=loss, validation={"perceptual_network": reported}))
    if refused is None:
        assert check().plans
        return
    with pytest.raises(UserError, match=refused[1]) as caught:
        check()
    assert caught.value.where == f"{refused[0]}.perceptual_network"
