"""What a user of Lightning and Hydra expects of hdm-train: loggers, callbacks, debugging, parts of other packages."""

import csv
import sys
from pathlib import Path

import pytest
import torch
import yaml

from composed import check_job, done_of, end_of, ledger_of, run_job, saved_in
from hdm_lightning import FlowModule
from hdm_lightning.cli.hydra_app import run_hydra
from hdm_lightning.cli.train import train
from hdm_lightning.errors import UserError
from hdm_lightning.training.checkpoint_io import read_checkpoint

FOREIGN = """
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger
from torch import nn


class Net(nn.Module):
    patch_size = 1

    def __init__(self, channels, width=8):
        super().__init__()
        self.config = type("Config", (), {"patch_size": 1, "positions": "area", "channels": channels})()
        self.inner = nn.Conv2d(channels, width, 1)
        self.outer = nn.Conv2d(width, channels, 1)

    def forward(self, latent, t, context, **rest):
        return self.outer(torch.relu(self.inner(latent)))


class Notes(Logger):
    seen = []
    name = version = "notes"

    def log_metrics(self, metrics, step=None):
        Notes.seen.append((step, sorted(metrics)))

    def log_hyperparams(self, *arguments, **keywords):
        pass


class Count(Callback):
    steps = 0

    def __init__(self, by=1):
        self.by = by

    def on_train_batch_end(self, *arguments):
        Count.steps += self.by


class Plain(torch.optim.SGD):
    made = 0

    def __init__(self, groups, momentum=0.0):
        Plain.made += 1
        super().__init__(groups, lr=1.0, momentum=momentum)
"""


@pytest.fixture
def job(toy_job, tmp_path):
    """Function of groups that gives a toy training of one stage with them laid over it."""

    def make(stages=None, **groups):
        config = toy_job(tmp_path / "run", **(stages or {"px16": {"samples": 16}}))
        for name, values in groups.items():
            config[name] = {**config.get(name, {}), **values} if isinstance(values, dict) else values
        return config

    return make


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """The package `foreign_parts`, which this project knows nothing of."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "foreign_parts.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    yield
    sys.modules.pop("foreign_parts", None)


def test_a_network_a_logger_a_callback_and_an_optimizer_of_another_package(job, foreign, capsys):
    import foreign_parts

    config = job(
        model={"_target_": "foreign_parts.Net"},
        module={"rule": "constant"},
        optimizer={"_target_": "foreign_parts.Plain", "momentum": 0.5},
        callbacks={"mine": {"_target_": "foreign_parts.Count", "by": 2}},
        logger={"mine": {"_target_": "foreign_parts.Notes"}, "tensorboard": None},
    )
    assert run_job(check_job(config)) == 0
    assert foreign_parts.Plain.made >= 1 and foreign_parts.Count.steps == 2 * 4  # two steps of two micro-batches
    assert any("val/loss" in names for _, names in foreign_parts.Notes.seen)
    assert {0, 16} <= {step for step, _ in foreign_parts.Notes.seen}  # on the axis of samples
    assert "the network is not an XUT" in capsys.readouterr().out
    assert done_of(config)["steps"] == 2


def test_metrics_go_into_a_csv_file(job):
    config = job(logger={"tensorboard": None, "csv": {
        "_target_": "lightning.pytorch.loggers.CSVLogger",
        "save_dir": "${run_dir}/${stage.folder}", "name": "csv",
    }})  # fmt: skip
    assert run_job(check_job(config)) == 0
    with (Path(config["run_dir"]) / "01-px16" / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    validated = [(int(row["step"]), float(row["val/loss"])) for row in rows if row.get("val/loss")]
    assert [step for step, _ in validated] == [0, 16]
    assert validated[-1][1] == pytest.approx(done_of(config)["validation"]["raw"], rel=1e-5)


def test_a_fast_run_of_every_stage_leaves_nothing(job):
    config = job(trainer={"fast_dev_run": True}, stages={"px16": {}, "px24": {"resolution": 24}})
    assert run_job(check_job(config)) == 0
    assert not Path(config["run_dir"]).exists()


def test_a_fast_run_beside_a_finished_one_takes_its_steps_and_changes_nothing(job, monkeypatch):
    whitened = {"text_encoder": {**job()["text_encoder"], "whiten_captions": 8}}
    assert run_job(check_job(job(**whitened))) == 0
    folder = Path(job()["run_dir"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    steps, original = [], FlowModule.training_step
    monkeypatch.setattr(FlowModule, "training_step", lambda *given: (steps.append(1), original(*given))[1])
    assert run_job(check_job(job(trainer={"fast_dev_run": True}, **whitened))) == 0
    assert steps
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_lightning_s_profiler_reports(job, capfd):
    assert run_job(check_job(job(trainer={"profiler": "simple"}))) == 0
    told = capfd.readouterr()
    assert "run_training_batch" in told.out + told.err


def test_without_callbacks_a_stage_still_ends_whole(job):
    config = job()
    checked = check_job(config)
    checked.config.callbacks = {}
    assert run_job(checked) == 0
    assert set(done_of(config)["validation"]) == {"raw"}
    final = Path(config["run_dir"]) / "final"
    weights = final / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.exists() and not weights.with_suffix(".raw.safetensors").exists()
    assert saved_in(config, "01-px16")


def test_lightning_s_early_stopping_and_best_checkpoint_as_callbacks(job, tmp_path):
    stopping = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "min_delta": 1e9}
    best = {
        "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
        "dirpath": str(tmp_path / "best"),
        "monitor": "val/loss",
        "filename": "best",
    }
    stopping |= {"patience": 1, "check_on_train_epoch_end": False}
    stages = {"px16": {"samples": 48, "validate_every": 8}}
    config = job(stages=stages, callbacks={"stopping": stopping, "best": best})
    assert run_job(check_job(config)) == 0
    assert done_of(config)["steps"] == 2 and done_of(config)["ended_by"] == "another callback"
    assert read_checkpoint(tmp_path / "best" / "best.ckpt")["hdm"]["step"] in (1, 2)


def test_a_stage_s_own_keys_of_the_trainer_and_the_module(job):
    stage = {"samples": 16, "trainer": {"gradient_clip_val": 0.25}, "module": {"weight_decay": 0.5}}
    config = job(stages={"px16": stage})
    assert run_job(check_job(config)) == 0
    saved = end_of(config)
    assert {group["weight_decay"] for group in saved["optimizer_states"][0]["param_groups"]} >= {0.5}


def test_a_part_that_cannot_be_imported_is_named(job):
    with pytest.raises(UserError) as caught:
        check_job(job(callbacks={"mine": {"_target_": "no_such_package.Thing"}}))
    assert caught.value.where == "callbacks.mine._target_"


@pytest.mark.slow
def test_three_stages_on_four_processes_are_those_on_one(toy_job, tmp_path):
    stages = {
        name: {"resolution": side, "samples": 16, "micro_batch_size": 2, "save_every": 0}
        for name, side in (("px16", 16), ("px24", 24), ("px32", 32))
    }
    one, four = (toy_job(tmp_path / name, **stages) for name in ("one", "four"))
    four["trainer"] |= {"devices": 4}
    assert run_job(check_job(one)) == run_job(check_job(four)) == 0
    losses = [done_of(config, "03-px32")["validation"] for config in (one, four)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    states = [end_of(config, "03-px32")["state_dict"] for config in (one, four)]
    assert all(torch.allclose(states[1][name], value, atol=1e-3) for name, value in states[0].items())


@pytest.mark.slow
def test_a_sweep_of_jobs_on_two_processes(toy_job, tmp_path, monkeypatch):
    """Every job starts its own processes; none runs the sweep again."""
    config = toy_job("unused", px16={"samples": 8, "validate_every": 0, "save_every": 0})
    schedule = config.pop("schedule")
    del config["run_dir"], config["name"]
    config.setdefault("callbacks", {})["sample_images"] = {"prompts": []}
    config["trainer"] |= {"devices": 2}
    groups = [{"override /schedule": None}, {"override /vae": "folder"}, {"override /trainer": "cpu"}]
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    content = yaml.safe_dump({"defaults": groups, **config, "schedule": schedule})
    (tmp_path / "conf" / "experiment" / "toy.yaml").write_text("# @package _global_\n" + content)
    line = ["--config-dir", str(tmp_path / "conf"), "-m", "experiment=toy", f"hydra.sweep.dir={tmp_path / 'jobs'}"]
    monkeypatch.setattr(sys, "argv", ["hdm-train", *line, "seed=0,1"])
    assert run_hydra(train, "train") == 0
    folders = sorted(path.parent.parent for path in (tmp_path / "jobs").glob("*/final/model_index.json"))
    assert len(folders) == 2
    for folder in folders:
        assert [event["devices"] for event in ledger_of(folder) if event["event"] == "start"] == [2]
