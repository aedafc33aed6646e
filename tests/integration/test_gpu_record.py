"""The recording of everything that needs a GPU, gone through at tiny sizes on a CPU."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from composed import OPTIMIZERS, check_job, of_hydra, tiny_job
from hdm_lightning.training.recorded import train_settings_from
from hdm_lightning.training.stages import plan_stages

OTHER = """
import torch


def build(batch, resolution, context_length, device):
    assert (batch, resolution, context_length, device) == (2, 64, 16, "cpu")
    weight = torch.ones(64, 64, requires_grad=True)
    return lambda: (weight @ weight).sum().backward()
"""
RECORD = Path(__file__).parents[2] / "experiments" / "gpu_record" / "record.py"


@pytest.mark.slow
def test_every_part_but_the_long_training_runs_on_a_cpu(tmp_path):
    parts = ["tests", "network", "beside", "step", "prepare", "train", "sample", "profile", "network_1024", "overlap"]
    parts += ["cached"]
    (tmp_path / "other.py").write_text(OTHER)
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    command = [sys.executable, str(RECORD), *parts, "--tiny", "--limit", "3000", *folders]
    command += ["--published", str(tmp_path / "other.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [row["part"] for row in record["parts"]] == parts
    train = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (train["stopped_with"], train["resumed_with"]) == (143, 0)
    first, second, resumed = train["fits"]
    assert (first["stage"], first["steps"]) == ("px256", 12)
    assert resumed["stage"] == second["stage"] == "px512" and resumed["from_step"] == second["steps"]
    assert resumed["from_step"] + resumed["steps"] == 12
    assert json.loads((tmp_path / "out" / "step.json").read_text())
    beside = json.loads((tmp_path / "out" / "beside.json").read_text())
    assert [row["name"] for row in beside["results"]] == ["ours", "other"] and beside["comparison"]["time_ratio"] > 0
    overlap = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert [row["name"] for row in overlap["results"]] == ["step, first", "step, overlap=true"]
    cached = json.loads((tmp_path / "out" / "cached.json").read_text())
    assert [row["name"] for row in cached["results"]] == ["step, first", "step, latents=false"]
    assert list((tmp_path / "out" / "samples").glob("*.png"))


def test_a_part_that_has_no_time_left_is_noted_and_unknown_ones_are_named(tmp_path):
    command = [sys.executable, str(RECORD), "--tiny", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    none_left = subprocess.run([*command, "step", "--limit", "1"], capture_output=True, text=True, check=False)
    assert none_left.returncode == 1
    record = json.loads((tmp_path / "record.json").read_text())
    assert [(row["part"], row["status"]) for row in record["parts"]] == [("step", "no time left")]
    unknown = subprocess.run([*command, "stepp"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2 and "stepp" in unknown.stderr and "network_1024" in unknown.stderr


@pytest.fixture
def record():
    """The script as a module."""
    sys.path.insert(0, str(RECORD.parent))
    try:
        yield importlib.import_module("record")
    finally:
        sys.path.remove(str(RECORD.parent))


def test_a_part_is_stopped_at_its_time_and_what_follows_keeps_within_the_limit(record, tmp_path, monkeypatch):
    """Each is written down when it ends; one that has no time left, or was not asked for, is told."""
    seen = []

    def sleeper(session, seconds):
        noted = tmp_path / "record.json"
        seen.append(json.loads(noted.read_text())["parts"] if noted.exists() else [])
        return record.call(session, "sleeper", [sys.executable, "-c", "import time; time.sleep(60)"], seconds)

    parts = {
        "quick": record.Part(5, lambda session, seconds: 0),
        "slow": record.Part(2, sleeper),
        "beside": record.Part(5, sleeper),
        "late": record.Part(60, sleeper),
    }
    monkeypatch.setattr(record, "PARTS", parts)
    session, begin = record.Session(tmp_path, tmp_path / "work", tiny=False), time.monotonic()
    assert record.run_parts(session, "cpu", list(parts), record.GRACE_S + 11) == 1
    assert time.monotonic() - begin < record.GRACE_S + 11
    rows = json.loads((tmp_path / "record.json").read_text())["parts"]
    assert [row["status"] for row in rows] == [0, 124, record.LEFT_OUT, "no time left"]
    assert [[row["part"] for row in parts] for parts in seen] == [["quick"]]


def test_the_training_that_a_gpu_runs_composes(record, tmp_path):
    """At its true sizes: two stages, the first ended by the clock, under the schedule's own keys."""
    words = record.training(record.Session(tmp_path, tmp_path / "work", tiny=False))
    overrides = [word for word in words[words.index("name=recorded") :] if not word.startswith("trainer=")]
    settings = train_settings_from(of_hydra("train", *overrides, "trainer=cpu"))
    first, second = plan_stages(settings.schedule, 1)
    assert (first.name, first.settings.resolution, first.accumulation) == ("px256", 256, 2)
    assert first.settings.stop.max_hours * 3600 == pytest.approx(record.RATE_S + record.COMPILE_S)
    assert (second.name, second.steps) == ("px512", 30)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_training_of_the_gpu_s_tests_passes_the_checks(
    tmp_path, tiny_shards, tiny_text_encoder, tiny_autoencoder, optimizer
):
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
    job = check_job(tiny_job(tmp_path, tiny_shards, tiny_text_encoder, tiny_autoencoder, optimizer, trainer))
    assert [plan.steps for plan in job.plans] == [64]
