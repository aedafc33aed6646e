"""Every file of every group composes with its command and passes the checks; mistakes are named as they were typed."""

import sys
from pathlib import Path

import hdm_lightning.conf
import pytest
from omegaconf import OmegaConf

from hdm_lightning.cli import overrides as arguments
from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.encoders.pretrained import TextEncoderSource
from hdm_lightning.errors import UserError
from hdm_lightning.generation.stored_pipeline import save_final
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.training.former_keys import MOVED, present_keys, present_spelling
from hdm_lightning.training.job import check_job

CONF = Path(hdm_lightning.conf.__file__).parent
TRAIN = ("model", "text_encoder", "vae", "data", "module", "optimizer", "lr_scheduler", "schedule", "hardware")
TRAIN += ("adapter", "trainer", "callbacks", "logger", "experiment", "hparams_search", "debug")
TRAIN_VAE = ("data", "optimizer", "lr_scheduler", "hardware", "trainer", "callbacks", "logger", "vae_training")
TRAIN_VAE += ("experiment_vae", "debug")
OF_THE_OTHER = {
    "train": [("callbacks", "autoencoder"), ("module", "autoencoder")],
    "train_vae": [("callbacks", "default")],
}
OF_INIT = ("of_init", "finetune", "lora", "lycoris")
"""Choices that leave something to the model of `init`, or stand beside it."""
OF_AN_ADAPTER = ["module.rule=constant", "model=of_init", "text_encoder=of_init", "vae=of_init", "schedule=lora"]
"""What an adapter trains with: the network and the encoders of its base."""
NEEDS = {"wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio", "adamw8bit": "torchao"}


def choices(command, groups):
    found = [(group, path.stem) for group in groups for path in sorted((CONF / group).glob("*.yaml"))]
    return [each for each in found if each not in OF_THE_OTHER[command]]


@pytest.fixture
def composed(tmp_path, tiny_text_encoder, tiny_autoencoder, tiny_shards):
    """Function of a command and overrides that gives a configuration whose models and data are here."""

    def compose_with(command, *overrides):
        here = [f"data.train={tiny_shards}", f"run_dir={tmp_path / 'run'}", "data.crop.max_upscale=null"]
        here += ["trainer.accelerator=cpu"]
        here += [] if any("trainer.devices" in each for each in overrides) else ["trainer.devices=1"]
        if command == "train":
            here += [f"text_encoder.name={tiny_text_encoder}", f"vae.name={tiny_autoencoder}"]
            here += ["model.context_width=16"]
        else:
            here += ["loss.perceptual_network=null"]
        return arguments.composed(command, [*overrides, *here])

    return compose_with


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_text_encoder, tiny_autoencoder):
    """A small model's folder."""
    config = XUTConfig(width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=1)
    folder = tmp_path_factory.mktemp("trained")
    source = TextEncoderSource(str(tiny_text_encoder), layer=-2, context_length=24)
    autoencoder, sampling = load_autoencoder(str(tiny_autoencoder)), {"height": 32, "width": 32}
    state = XUT(config).state_dict()
    save_final(folder, state, xut=config, text_encoder=source, autoencoder=autoencoder, sampling=sampling)
    return folder


def test_a_fine_tuning_is_of_the_kind_of_its_base(composed, trained, tiny_text_encoder):
    """And what the command says itself is left as it is."""
    for experiment in ("finetune", "lora"):
        config = composed("train", f"experiment={experiment}", f"init={trained}", "schedule.stages.tune.samples=100")
        for key in ("text_encoder.name", "vae.name", "model.context_width"):
            OmegaConf.update(config, key, None)
        job = check_job(config)
        assert job.config.model.width == 32 and job.config.model.residual == "input"
        assert (job.config.text_encoder.name, job.config.text_encoder.layer) == (str(tiny_text_encoder), -2)
        assert job.config.vae.name == str(trained / "vae")
        (plan,) = job.plans
        assert (plan.settings.resolution, plan.settings.context_length) == (32, 24)
    with pytest.raises(UserError, match="which is not set"):
        check_job(composed("train", "experiment=finetune"))


@pytest.mark.parametrize(("group", "name"), choices("train", TRAIN))
def test_every_choice_of_hdm_train_passes_the_checks(composed, trained, group, name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name == "optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    extra = ["vae.mean=null", "vae.std=null"] if (group, name) != ("vae", "eq_sdxl") else []
    if name == "paper_cached":  # which asks for latents, and images are here
        with pytest.raises(UserError, match="contains images") as caught:
            check_job(composed("train", f"{group}={name}", *extra))
        assert caught.value.where == "schedule.stages.px256.latents"
        extra += [f"schedule.stages.{stage}.latents=null" for stage in ("px256", "px512")]
    extra += [f"init={trained}"] if name in OF_INIT else []
    extra += OF_AN_ADAPTER if group == "adapter" else []
    job = check_job(composed("train", f"{group}={name}", *extra))
    assert job.plans and job.processes == 1


@pytest.mark.parametrize(("group", "name"), choices("train_vae", TRAIN_VAE))
def test_every_choice_of_hdm_train_vae_passes_the_checks(composed, tiny_autoencoder, group, name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    preset = [] if group in ("vae_training", "experiment_vae") else ["vae_training=from_scratch_tiny"]
    config = composed("train_vae", f"{group}={name}", *preset)
    if config.autoencoder.config is None:  # a model of the hub, which is not here
        config.autoencoder.source = str(tiny_autoencoder)
        config.equivariance = {**config.equivariance, "scale_numerators": [8, 16], "scale_denominator": 32}
    assert check_job(config).plans[0].steps > 0


@pytest.mark.parametrize(
    ("overrides", "where", "words"),
    [
        (["+trainer.pricision=x"], "trainer.pricision", "precision"),
        (["trainer.log_every_n_steps=often"], "trainer.log_every_n_steps", "integer"),
        (["trainer.strategy=deepsped"], "trainer.strategy", "deepspeed"),
        (["trainer.devices=x"], "trainer.devices", "number"),
        (["+data.workrs=3"], "data.workrs", "num_workers"),
        (["data.window=wide"], "data.window", "integer"),
        (["+data.crop.flipp=true"], "data.crop.flipp", "flip"),
        (["module.rule=odd"], "module.rule", "mup"),
        (["+module.rate=1"], "module.rate", "routing_rate"),
        (["optimizer.eps=small"], "optimizer.eps", "number"),
        (["+optimizer.epsilon=1"], "optimizer.epsilon", "eps"),
        (["optimizer=muon", "optimizer.momentum=1"], "optimizer.momentum", "less than 1"),
        (["optimizer=muon", "optimizer.rounds=0"], "optimizer.rounds", "greater than or equal to 1"),
        (["optimizer._target_=torch.optim.Adamm"], "optimizer._target_", "cannot be imported"),
        (["callbacks.checkpoint.keep=few"], "callbacks.checkpoint.keep", "integer"),
        (["+callbacks.guard.patiense=1"], "callbacks.guard.patiense", "patience"),
        (["+callbacks.gard.patience=1"], "callbacks.gard", "guard"),
        (["schedule.stages.px256.learning_rate=fast"], "schedule.stages.px256.learning_rate", "number"),
        (["schedule.stages.px256.routing_rate=1"], "schedule.stages.px256.routing_rate", "less than 1"),
        (["+schedule.stages.px256.resolutoin=3"], "schedule.stages.px256.resolutoin", "resolution"),
        (
            ["schedule.stages.px256.activation_checkpointing=often"],
            "schedule.stages.px256.activation_checkpointing",
            "selective",
        ),
        (["schedule.stages=5"], "schedule.stages", "dictionary"),
        (["hardware.float8=true"], "hardware.float8", "CPU"),
        (["hardware.threads=-1"], "hardware.threads", "greater than or equal to 0"),
        (["+sede=1"], "sede", "seed"),
        (["guard.spike_factor=1"], "guard.spike_factor", "greater than 1"),
    ],
)
def test_a_wrong_key_or_value_is_named_as_it_was_typed(composed, overrides, where, words):
    with pytest.raises(UserError) as caught:
        check_job(composed("train", *overrides))
    assert caught.value.where == where and caught.value.hint
    assert words in f"{caught.value.what} {caught.value.hint}"


def test_a_key_of_an_earlier_version_says_where_it_went():
    assert present_keys(["data.workers=3", "-m", "+data.workers=1"], "train") == [
        "data.num_workers=3",
        "-m",
        "+data.num_workers=1",
    ]
    assert present_keys(["trainer.compile=true"], "demo") == ["trainer.compile=true"]
    for typed, said in {
        "trainer.compile=true": "hardware.compile=true",
        "callbacks.ema.halflife_samples=[1]": "callbacks.weight_averages.halflife_samples=[1]",
        "callbacks.ema.snapshot_every=5": "callbacks.store_averages.every_n_samples=5",
        "++logger.every_steps=3": "trainer.log_every_n_steps=3",
        "trainer.static_graph=true": "trainer.strategy=ddp_static_graph",
    }.items():
        with pytest.raises(UserError, match="has moved") as caught:
            present_keys([typed], "train")
        assert caught.value.where == typed.partition("=")[0].lstrip("+") and caught.value.hint == said
    with pytest.raises(UserError) as caught:
        present_keys(["experiment=eqvae_paper"], "train_vae")
    assert caught.value.hint == "experiment_vae=eqvae_paper"


def test_every_place_that_a_moved_key_is_said_to_have_exists(composed):
    for command, keys in (("train", MOVED), ("train_vae", ("ema", "checkpoints", "validation.pictures"))):
        config = composed(command, *(["optimizer=muon"] if command == "train" else ["vae_training=from_scratch_tiny"]))
        for old in keys:
            new = MOVED[old].partition("=")[0]
            if not (command == "train" and new == "validation.images"):
                assert OmegaConf.select(config, new, default="absent") != "absent", (command, old, new)


def test_a_record_keeps_the_keys_of_classes_of_ones_own():
    """Also where an earlier version called something else so."""
    own = {
        "optimizer": {"_target_": "mine.Optimizer", "name": "x", "rule": 3},
        "callbacks": {"ema": {"_target_": "m.E"}},
    }
    values = {"module": {"rule": "mup"}, "data": {"_target_": "d", "workers": 2}, **own}
    found = OmegaConf.to_container(present_spelling(values))
    assert found == {"module": {"rule": "mup"}, "data": {"_target_": "d", "num_workers": 2}, **own}


def test_a_missing_library_of_an_extra_is_named_with_the_extra(monkeypatch, composed):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="torchao") as caught:
        check_job(composed("train", "optimizer=adamw8bit"))
    assert caught.value.where == "optimizer._target_"
    assert caught.value.hint == "pip install 'hdm-lightning[lowbit]'"
