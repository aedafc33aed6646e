"""What a run says at its start, at each stage's end and at its own, and that its log keeps it."""

import shlex
import shutil

import pytest

from composed import check_job, done_of, ledger_of, run_job
from hdm_lightning.cli import sample
from hdm_lightning.data.index import load_index
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.training import run_log
from toy_run import run_config


@pytest.fixture
def config(tmp_path, tiny_text_encoder, tiny_autoencoder, tiny_shards, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = {"micro_batch_size": 8, "validate_every": 0, "save_every": 0, "warmup_samples": 0}
    return run_config(
        tmp_path / "my runs" / "toy",
        tiny_text_encoder,
        tiny_autoencoder,
        tiny_shards,
        {"one": {**stage, "samples": 16}, "two": {**stage, "samples": 8}},
        trainer={"accelerator": "cpu"},
        hardware={"threads": 1, "usd_per_device_hour": 3600.0},
        callbacks={"weight_averages": {"halflife_samples": [16]}},
    )


def test_a_run_says_what_it_does_and_keeps_it(config, tmp_path, tiny_shards, capsys):
    job = check_job(config)
    assert run_job(job) == 0
    lines = capsys.readouterr().out.splitlines()
    kept = (job.run_dir / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in kept] == lines

    told = {line.split()[0]: line for line in lines}
    parameters = sum(each.numel() for each in XUT(XUTConfig(**config["model"])).parameters())
    assert f"{parameters:,} parameters" in told["model"] and "from scratch" in told["model"]
    assert "CPU, 1 process, 32-true" in told["device"]
    samples = load_index(str(tiny_shards)).samples
    assert f"{samples:,} samples, 24 to see (one 16 + two 8)" in told["data"]
    assert "my runs/toy, begins" in told["run"] and shlex.split(told["run"])[-1] == "my runs/toy"

    events = ledger_of(config)
    for stage, seen, comes in (("one", 16, "two, 8 samples at 16 px"), ("two", 8, "my runs/toy/final")):
        (line,) = [each for each in lines if each.startswith(f"{stage} is done")]
        number = 1 + ["one", "two"].index(stage)
        done = done_of(config, f"{number:02d}-{stage}")
        dollars = sum(event.get("cost_usd", 0.0) for event in events if event["stage"] == stage)
        assert f"{seen} samples · validation loss {done['validation']['ema_16']:.4f} (averaged weights)" in line
        assert f"${dollars:,.2f}" in line and comes in line

    words = shlex.split(told["next"])[1:]
    assert words[0] == "hdm-sample" and (tmp_path / words[1] / "final" / "model_index.json").exists()
    assert sample.main([*words[1:], "--steps", "1", "--out", str(tmp_path / "drawn"), "--device", "cpu"]) == 0
    assert list((tmp_path / "drawn").glob("*.png"))


def test_a_stage_s_own_data_are_the_ones_that_are_named(config, tmp_path, tiny_shards, capsys):
    shutil.copytree(tiny_shards, tmp_path / "own")
    config["schedule"]["stages"] = {"one": config["schedule"]["stages"]["one"] | {"data": {"train": "own"}}}
    assert run_job(check_job(config)) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data ")]
    assert told.startswith(f"data    own: {load_index(str(tiny_shards)).samples:,} samples")


def test_a_resumed_and_a_finished_run_say_so(config, capsys):
    job = check_job(config)
    assert run_job(job) == 0
    for path in (job.run_dir / "02-two").rglob("*"):  # as if it had been killed between two stages
        if path.is_file():
            path.unlink()
    capsys.readouterr()
    assert run_job(check_job(config)) == 0
    assert "resumes two after 0 of its 8 samples" in capsys.readouterr().out
    assert run_job(check_job(config)) == 0
    told = capsys.readouterr().out
    assert "is finished" in told and "needs another name=" in told and "init=" in told


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "train.log").symlink_to(tmp_path / "elsewhere")
    with run_log.kept_in(tmp_path):
        run_log.say("first")
        run_log.say("second\x1b[2J")
    out = capsys.readouterr().out
    assert "first" in out and "second" in out and "\x1b" not in out and out.count("cannot be written") == 1
    assert (tmp_path / "elsewhere").read_text() == "mine"
