"""What a run leaves for TensorBoard, read back and held against numbers computed apart."""

import re
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from composed import check_job, done_of, ledger_of, run_job
from hdm_lightning import FlowModule
from hdm_lightning.profiling.operations import training_flops
from hdm_lightning.training.callbacks.stage_checkpoint import StageCheckpoint
from hdm_lightning.training.recorded import model_config_from

PEAK = 0.001
PASS = 40


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


@pytest.fixture(scope="module")
def finished(toy_job, tmp_path_factory):
    config = toy_job(tmp_path_factory.mktemp("monitored"), px16={}, px32={"resolution": 32, "samples": 16})
    config["hardware"] |= {"peak_tflops": PEAK, "usd_per_device_hour": 0.5}
    assert run_job(check_job(config)) == 0
    return config


def test_scalars_of_a_run(finished):
    run_dir = Path(finished["run_dir"])
    tags, events = scalars(run_dir / "01-px16" / "tensorboard")
    for (step, speed), (_, utilisation) in zip(tags["speed/tflops"], tags["speed/mfu"], strict=True):
        assert utilisation == pytest.approx(speed / PEAK, rel=1e-5)
        assert speed > 0 and step % 16 == 0
    # Every caption of the shards has six words, and a dropped one a single token, which is padded to six and computed
    # as one. An 8x8 grid would be 32 px at factor 4.
    model = model_config_from(finished["model"])
    full, dropped = (training_flops(model, (4, 4), tokens, 0.5) for tokens in (6, 1))
    columns = (tags[f"speed/{name}"] for name in ("tflops", "images_per_s", "padding_share"))
    for (_, speed), (_, rate), (_, padding) in zip(*columns, strict=True):
        assert speed == pytest.approx(rate * (full + padding * 6 / 5 * (dropped - full)) / 1e12, rel=1e-5)
        assert 0 <= padding < 0.5
    assert tags["seen/samples"][-1] == (48, 48)
    assert tags["seen/passes"][-1][1] == pytest.approx(48 / PASS)
    assert {value for _, value in tags["seen/masked"]} == {0}
    assert 0 < tags["memory_gb/host"][-1][1] <= tags["memory_gb/host_peak"][-1][1] * 1.01
    assert all(0 < value <= 1 for _, value in tags["speed/training_share"])
    names = ("data", "vae", "text", "xut", "backward", "optimizer")
    parts = sum(tags[f"step_time_ms/{name}"][-1][1] for name in names)
    assert 0.5 < parts / tags["step_time_ms/whole"][-1][1] < 1.05
    second, _ = scalars(run_dir / "02-px32" / "tensorboard")
    assert second["train/loss_mean"][-1][0] == 64  # one axis over stages
    assert second["seen/samples"][-1] == (64, 16)
    assert "config/text_summary" in events.Tags()["tensors"]


def test_validation_and_saving_are_no_part_of_a_step(toy_job, tmp_path, monkeypatch):
    """Both are slow and at step 3, scalars at step 4: the parts of the four steps are as they are, and none is lost."""
    losses, save = FlowModule.losses, StageCheckpoint.save

    def slow_losses(self, batch, network, t):
        training = "scores" in batch
        with self.section("network" if training else "encode_images"):
            time.sleep(0.1 if training else 0.3)
        return losses(self, batch, network, t)

    def slow_save(self, trainer):
        time.sleep(1.0)
        return save(self, trainer)

    monkeypatch.setattr(FlowModule, "losses", slow_losses)
    monkeypatch.setattr(StageCheckpoint, "save", slow_save)
    config = toy_job(tmp_path, px16={"validate_every": 24, "save_every": 24})
    config["trainer"]["log_every_n_steps"] = 4
    assert run_job(check_job(config)) == 0
    tags, _ = scalars(tmp_path / "01-px16" / "tensorboard")
    first = {name: tags[f"step_time_ms/{name}"][0][1] for name in ("vae", "xut", "optimizer", "whole")}
    assert first["optimizer"] < 200 and first["vae"] < 200
    assert 200 <= first["xut"] < first["whole"] < 600  # two micro-batches a step


def test_every_chart_of_the_first_page_shows_something(finished):
    tags, events = scalars(Path(finished["run_dir"]) / "01-px16" / "tensorboard")
    proto = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(proto)
    assert layout.category[0].title == "Is it learning?"
    for category in layout.category:
        for chart in category.chart:
            shown = [tag for tag in tags for pattern in chart.multiline.tag if re.fullmatch(pattern, tag)]
            assert shown, chart.title


def test_the_settings_and_the_outcome_of_a_run_stand_in_one_row(finished):
    run_dir = Path(finished["run_dir"])
    tags, events = scalars(run_dir / "hparams")
    for name, value in done_of(run_dir, "02-px32")["validation"].items():
        assert tags[f"outcome/validation_loss_{name}"] == [(64, pytest.approx(value, rel=1e-6))]
    spent = sum(event.get("cost_usd", 0) for event in ledger_of(run_dir))
    assert tags["outcome/cost_usd"][0][1] == pytest.approx(spent, rel=1e-5)
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    row = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert row["schedule.stages.px16.learning_rate"].number_value == 0.2
    assert row["module.rule"].string_value == "mup"
    assert "run_dir" not in row
