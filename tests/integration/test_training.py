"""The whole training path at toy size: stages, hand-over, resume, ranks."""

import inspect
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

import hdm_lightning
from composed import check_job, done_of, end_of, ledger_of, run_job, saved_in, weights_of
from crash import Crash, crashing_at
from hdm_lightning.cli.command import run_command
from hdm_lightning.cli.train import main
from hdm_lightning.data import worker_processes
from hdm_lightning.errors import UserError
from hdm_lightning.training.callbacks.ends import ValidateAtEnds
from toy_run import MODEL, STAGE, run_config


@pytest.fixture
def config(tmp_path, tiny_text_encoder, tiny_autoencoder, tiny_shards):
    stages = {
        "px16": {},
        "px24": {"resolution": 24, "batch_size": 16, "samples": 32},
        "px32": {"resolution": 32, "routing_rate": 0.0, "samples": 16},
    }
    return run_config(tmp_path / "run", tiny_text_encoder, tiny_autoencoder, tiny_shards, stages)


def final_weights(config):
    return weights_of(config, "03-px32")


def test_three_stages_run_and_export(config):
    job = check_job(config)
    assert run_job(job) == 0
    for stage, steps in (("01-px16", 6), ("02-px24", 2), ("03-px32", 2)):
        done = done_of(config, stage)
        assert done["steps"] == steps
        assert set(done["validation"]) == {"raw", "ema_16", "ema_64"}
    assert (job.run_dir / "final" / "model_index.json").exists()
    assert [event["event"] for event in ledger_of(config)].count("end") == 3
    assert torch.stack([w.abs().sum() for w in final_weights(config).values()]).isfinite().all()


def test_six_frames_of_ours_lead_from_the_command_to_the_fit(config, tmp_path, monkeypatch):
    """main, run_hydra, train, launch, run_schedule, fit_stage."""
    groups, schedule = [{"override /vae": "folder"}, {"override /trainer": "cpu"}], config.pop("schedule")
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "schedule").mkdir()
    (tmp_path / "conf" / "schedule" / "toy.yaml").write_text(yaml.safe_dump(schedule))
    content = yaml.safe_dump({"defaults": [{"override /schedule": "toy"}, *groups], **config})
    (tmp_path / "conf" / "experiment" / "toy.yaml").write_text("# @package _global_\n" + content)
    monkeypatch.setattr("sys.argv", ["hdm-train", "--config-dir", str(tmp_path / "conf"), "experiment=toy"])
    ours, package = [], str(Path(hdm_lightning.__file__).parent)

    def fit(trainer, *args, **kwargs):
        ours[:] = [each.function for each in inspect.stack() if each.filename.startswith(package)]
        raise Crash

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(Crash):
        main()
    assert len(ours) <= 6, ours
    assert ours[0] == "fit_stage" and ours[-1] == "main"


def test_killed_and_resumed_equals_uninterrupted(config, tmp_path, monkeypatch):
    whole = {**config, "run_dir": str(tmp_path / "whole")}
    assert run_job(check_job(whole)) == 0
    for stage, step in (("px16", 1), ("px16", 5), ("px24", 2), ("px32", 1)):
        with crashing_at(step, stage):
            run_job(check_job(config))
    assert run_job(check_job(config)) == 0
    expected, got = final_weights(whole), final_weights(config)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert done_of(whole, "03-px32")["validation"] == done_of(config, "03-px32")["validation"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops_and_the_run_goes_on(config, tmp_path, monkeypatch, capfd, number, status):
    whole = {**config, "run_dir": str(tmp_path / "whole")}
    assert run_job(check_job(whole)) == 0
    with monkeypatch.context() as patch:
        original = ValidateAtEnds.on_step_end

        def send(self, trainer, module, at):
            original(self, trainer, module, at)
            if (module.stage, at) == ("px16", 3):  # no checkpoint is due here
                os.kill(os.getpid(), number)

        patch.setattr(ValidateAtEnds, "on_step_end", send)
        assert run_job(check_job(config)) == status
    told = capfd.readouterr()
    assert "interrupted; the same command resumes from step 3" in told.out
    assert ("Ctrl-C again ends at once" in told.err) == (number == signal.SIGINT)
    saved = [path.name for path in saved_in(config, "01-px16")]
    assert saved[-1] == "step-00000003.ckpt"
    assert run_job(check_job(config)) == 0
    expected, got = final_weights(whole), final_weights(config)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_a_data_worker_that_is_killed_ends_the_command_with_status_2_and_the_same_command_goes_on(
    config, monkeypatch, capsys
):
    config["data"]["num_workers"], config["validation"]["samples"] = 1, 0
    config["schedule"]["stages"] = {"px16": {**STAGE, "resolution": 16, "samples": 64}}
    monkeypatch.setattr(worker_processes, "POLL_S", 1)
    original, others = ValidateAtEnds.on_step_end, {child.pid for child in multiprocessing.active_children()}

    def kill(self, trainer, module, at):
        original(self, trainer, module, at)
        if at == 3:
            for child in multiprocessing.active_children():
                if child.pid not in others:
                    os.kill(child.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(ValidateAtEnds, "on_step_end", kill)
        assert run_command(lambda: run_job(check_job(config))) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: data.num_workers: ") and "resumes" in told.err and "Traceback" not in told.err
    assert list((Path(config["run_dir"]) / "01-px16" / "checkpoints").iterdir())
    assert run_job(check_job(config)) == 0
    assert "resumes px16 after" in capsys.readouterr().out


@pytest.mark.parametrize(("minutes", "steps"), [(0.0, [6]), (20.0, [6]), (1e-9, [1, 2, 3, 4, 5, 6])])
def test_a_checkpoint_is_written_after_so_many_minutes(config, minutes, steps):
    stage = {**config["schedule"]["stages"]["px16"], "samples": 48, "batch_size": 8, "save_every": 0}
    callbacks = {**config["callbacks"], "checkpoint": {"keep": 9, "every_minutes": minutes}}
    assert run_job(check_job({**config, "callbacks": callbacks, "schedule": {"stages": {"px16": stage}}})) == 0
    saved = saved_in(config, "01-px16")
    assert [int(path.stem.removeprefix("step-")) for path in saved] == steps


def test_resume_never_refuses_a_folder_with_a_run(config):
    one_stage = {**config, "schedule": {"stages": {"px16": config["schedule"]["stages"]["px16"]}}}
    assert run_job(check_job(one_stage)) == 0
    with pytest.raises(UserError, match="already contains checkpoints"):
        check_job({**one_stage, "resume": "never"})


def first_moments(config):
    states = end_of(config)["optimizer_states"][0]["state"]
    return {number: state["exp_avg"] for number, state in states.items()}


def test_two_processes_have_the_gradients_of_one(config, tmp_path):
    stage = {**config["schedule"]["stages"]["px16"], "samples": 8}  # one step: its first moment is the gradient
    one = {**config, "run_dir": str(tmp_path / "one"), "schedule": {"stages": {"px16": stage}}}
    two = {**one, "run_dir": str(tmp_path / "two"), "trainer": {**config["trainer"], "devices": 2}}
    assert run_job(check_job(one)) == 0
    assert run_job(check_job(two)) == 0
    expected, got = first_moments(one), first_moments(two)
    size = max(value.abs().max() for value in expected.values())
    assert size > 0
    assert max((got[number] - value).abs().max() for number, value in expected.items()) < 1e-5 * size
    losses = [done_of(run)["validation"] for run in (one, two)]
    for name, value in losses[0].items():
        assert losses[1][name] == pytest.approx(value, rel=1e-5)
    for run in (one, two):  # one process writes, whatever their number
        assert len(list(Path(run["run_dir"]).glob("*/tensorboard/events.*"))) == 1


def test_gradients_are_clipped_in_bfloat16_too(config):
    """After one step the first moments are (1 - beta) times the clipped gradient."""
    stage = {**config["schedule"]["stages"]["px16"], "samples": 8, "gradient_clip": 0.01, "betas": [0.9, 0.98]}
    mixed = {**config["trainer"], "precision": "bf16-mixed"}
    assert run_job(check_job({**config, "trainer": mixed, "schedule": {"stages": {"px16": stage}}})) == 0
    norm = torch.nn.utils.get_total_norm(first_moments(config).values())
    assert float(norm) == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"model": {**MODEL, "context_width": 24}}, "model.context_width"),
        ({"model": {**MODEL, "channels": 8}}, "model.channels"),
        ({"model": {**MODEL, "widht": 8}}, "model.widht"),
        ({"schedule": {"stages": {"a": {**STAGE, "resolution": 18}}}}, "schedule.stages.a.resolution"),
        ({"schedule": {"stages": {"a": {**STAGE, "resolution": 16, "batch_size": 6}}}}, "schedule.stages.a.batch_size"),
        ({"text_encoder": {"name": "/nowhere/at/all"}}, "text_encoder.name"),
        ({"vae": {"name": "/nowhere/at/all"}}, "vae.name"),
        ({"vae": {"name": "any", "max_pixels": 0}}, "vae.max_pixels"),
        ({"text_encoder": {"name": "any", "max_tokens": 0}}, "text_encoder.max_tokens"),
        ({"resume": "maybe"}, "resume"),
        ({"data": {"train": "any", "num_workers": 0, "bad_patience": "64"}}, "data.bad_patience"),
        ({"data": {"train": "any", "num_workers": 0, "max_bad_share": "0.5"}}, "data.max_bad_share"),
        ({"trainer": {"accelerator": "tpu"}}, "trainer.accelerator"),
    ],
)
def test_mistakes_are_named_before_anything_is_built(config, change, where):
    with pytest.raises(UserError) as caught:
        check_job({**config, **change})
    assert caught.value.where == where
    assert caught.value.hint


def test_a_missing_or_empty_data_folder_is_named(config, tmp_path):
    for folder in (tmp_path / "missing", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        with pytest.raises(UserError, match=folder.name):
            check_job({**config, "data": {**config["data"], "train": str(folder)}})
