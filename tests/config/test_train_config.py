"""Every choice of every group composes and passes the typed check; the paper's numbers stand where they should."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hdm_lightning.conf
import pytest
from omegaconf import OmegaConf

from hdm_lightning.cli import overrides
from hdm_lightning.data.rules import sources_from
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.config import PRESETS, PUBLISHED
from hdm_lightning.training.recorded import model_config_from, train_settings_from
from hdm_lightning.training.recorded_data import recorded_training_stream
from hdm_lightning.training.stages import plan_stages

CONF = Path(hdm_lightning.conf.__file__).parent


def composed(*given):
    return overrides.composed("train", ["data.train=shards", *given])


@pytest.mark.parametrize("command", ["train", "train_vae", "demo"])
def test_requests_to_the_hub_are_not_noted_on_the_screen(command):
    """Under what Hydra makes of the root logger, which shows everything."""
    hydra = overrides.composed(command, return_hydra_config=True).hydra
    program = (
        "import json, logging.config, sys; import huggingface_hub.utils._http as http\n"
        "logging.config.dictConfig(json.loads(sys.argv[1]))\n"
        "client = next(name for name in ('httpx', 'httpx2') if hasattr(http, name))\n"
        "logging.getLogger(client).info('HTTP Request'); logging.getLogger('hydra').info('shown')"
    )
    given = json.dumps(OmegaConf.to_container(hydra.hydra_logging, resolve=True))
    run = subprocess.run([sys.executable, "-c", program, given], capture_output=True, text=True, check=True)
    assert "shown" in run.stdout and "HTTP Request" not in run.stdout


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_model_presets_are_those_of_the_package(name):
    """As Hydra composes them, which knows more of YAML's defaults than the package does."""
    assert model_config_from(OmegaConf.to_container(composed(f"model={name}").model)) == XUTConfig.preset(name)


def test_every_model_file_is_a_preset():
    named = {path.stem for path in (CONF / "model").glob("*.yaml")}
    assert sorted(PRESETS) == sorted(named - {"of_init"})


def test_presets_with_changes_make_networks():
    network = XUT.from_preset("xut_tiny", context_width=24, depth=1)
    assert (network.config.width, network.config.context_width, len(network.encoder)) == (256, 24, 1)
    same = XUT.from_fields(**network.config.to_json())
    assert same.config == network.config
    with pytest.raises(ValueError, match=r"unknown XUT fields \['widht'\]"):
        XUT.from_preset("xut_tiny", widht=8)


def test_the_released_wiring_and_the_paper_s_sizes_are_as_published():
    """arXiv 2509.06068, table 1: width, MLP, heads, head dim, text width, decoder blocks."""
    table = {
        "xut_small": (896, 3072, 14, 64, 640, 2),
        "xut_base": (1024, 3072, 16, 64, 1024, 3),
        "xut_large": (1280, 4096, 10, 128, 1152, 3),
    }
    names = ("width", "mlp_width", "heads", "head_dim", "context_width", "decoder_blocks")
    for preset, values in table.items():
        assert tuple(getattr(XUTConfig.preset(preset), name) for name in names) == values
    wiring = {"residual": "normed", "skips": "last", "positions": "long_side", "rope_init": "all_pi"}
    assert dict(PUBLISHED) == wiring
    assert XUTConfig.preset("published") == XUTConfig.preset("xut_base", **wiring)


def test_the_paper_s_recipe_has_the_paper_s_numbers():
    stages = train_settings_from(composed("schedule=paper")).schedule.stages
    plans = plan_stages(train_settings_from(composed("schedule=paper")).schedule, world_size=4)
    # arXiv 2509.06068: resolution, rate, decay, beta2, clip, batch, per device, accumulation, TREAD, text, samples.
    # At 256 px the paper's 2048 are 128 a device, four times; here 32, sixteen times, so that they fit.
    table = {
        "px256": (256, 0.5, 0.02, 0.98, 3.0, 2048, 32, 16, 0.5, 256, 152.5e6),
        "px512": (512, 0.1, 0.005, 0.995, 1.0, 512, 64, 2, 0.5, 256, 42.34e6),
        "px768": (768, 0.05, 0.002, 0.995, 1.0, 512, 64, 2, 0.5, 256, 8.469e6),
        "px1024": (1024, 0.02, 0.002, 0.995, 1.0, 256, 16, 4, 0.0, 512, 3.649e6),
    }
    assert list(stages) == list(table)
    for plan, (name, row) in zip(plans, table.items(), strict=True):
        stage = stages[name]
        got = (stage.resolution, stage.learning_rate, stage.weight_decay, stage.betas[1], stage.gradient_clip)
        got += (stage.batch_size, stage.micro_batch_size, plan.accumulation, stage.routing_rate, stage.context_length)
        assert got == row[:-1]
        assert stage.samples == pytest.approx(row[-1], rel=2e-4)
        assert stage.warmup_samples == 1000 * stage.batch_size
        assert stage.activation_checkpointing == (name != "px256")


@pytest.mark.parametrize(("size", "width"), [("small", 640), ("large", 1152)])  # widths of the two Gemma-3
def test_the_paper_s_other_sizes_train_by_the_same_recipe(size, width):
    """Only what a device takes at once is their own: steps and batches are the paper's."""
    settings = train_settings_from(composed(f"experiment=paper_{size}"))
    model = model_config_from(settings.model)
    assert model == XUTConfig.preset(f"xut_{size}") and model.context_width == width
    assert {"small": "270m", "large": "1b"}[size] in settings.text_encoder.name
    paper = train_settings_from(composed("schedule=paper"))
    plans = [plan_stages(each.schedule, world_size=4) for each in (settings, paper)]
    for ours, theirs in zip(*plans, strict=True):
        assert ours.steps == theirs.steps and ours.name == theirs.name
        assert replace(ours.settings, micro_batch_size=1) == replace(theirs.settings, micro_batch_size=1)


def test_any_value_of_a_stage_can_be_overridden():
    config = composed("schedule.stages.px512.betas=[0.8,0.9]", "+schedule.stages.px256.data.window=7")
    settings = train_settings_from(config)
    assert tuple(settings.schedule.stages["px512"].betas) == (0.8, 0.9)
    first, second, *_ = plan_stages(settings.schedule, 1)
    windows = [recorded_training_stream(settings, plan, None).window for plan in (first, second)]
    assert windows == [7, 32]


def test_unknown_model_keys_are_named():
    with pytest.raises(UserError, match=r"model\.widht") as caught:
        model_config_from({"widht": 3})
    assert "width" in caught.value.hint


def test_spellings_of_sources():
    assert [source.urls for source in sources_from("a", "data.train")] == [("a",)]
    assert [source.urls for source in sources_from(["a", "b"], "data.train")] == [("a", "b")]
    mixed = sources_from([{"urls": "a", "weight": 3.0}, {"urls": ["b", "c"], "weight": 1.0}], "data.train")
    assert [(source.urls, source.weight) for source in mixed] == [(("a",), 3.0), (("b", "c"), 1.0)]
    with pytest.raises(UserError, match=r"data\.train\[0\]"):
        sources_from([{"url": "a"}], "data.train")


def test_job_folder_names_are_short_and_distinct():
    long = ",".join(f"schedule.stages.px{n}.learning_rate=0.1" for n in range(9))
    names = {overrides.short_name(long), overrides.short_name(long + "5"), overrides.short_name("seed=1")}
    assert len(names) == 3
    assert max(map(len, names)) <= 120
    assert overrides.short_name("vae.name=a/b") == "vae.name=a-b"


@pytest.mark.parametrize(
    ("command", "begin", "names"),
    [
        ("train", "hdm-train: train a text-to-image model", [*choices("experiment"), "init: null"]),
        ("train_vae", "hdm-train-vae: train or fine-tune an autoencoder", choices("vae_training")),
        ("plan", "hdm-plan: time, memory, disk and cost of a schedule", ["usd_per_kwh: 0.3"]),
        ("demo", "hdm-demo: from scratch to images", ["variation: 0.15"]),
    ],
)
def test_help_begins_with_what_the_command_does_and_names_its_choices(command, begin, names):
    code = f"from hdm_lightning.cli.{command} import main; main()"
    told = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True).stdout
    assert told.startswith(begin)
    assert all(name in told for name in names)
