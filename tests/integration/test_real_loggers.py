"""A run's numbers and pictures in the loggers of other packages, each of which must be installed and is read back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from composed import check_job, run_job

DRAWN = {"sample_images": {"prompts": ["a star"], "steps": 1, "aspect_ratios": [1.0]}}


@pytest.fixture
def job(toy_job, tmp_path):
    """Function of a logger's node that gives the configuration of a run with two stages."""

    def configuration(name, node):
        config = toy_job(tmp_path / "run", px16={"samples": 16}, px24={"samples": 16, "resolution": 24})
        config["callbacks"] = {**config["callbacks"], **DRAWN}
        return {**config, "logger": {name: node}}

    return configuration


@pytest.mark.loggers
def test_mlflow_has_numbers_and_pictures(job, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path}/mlruns"
    node = {"_target_": "lightning.pytorch.loggers.MLFlowLogger", "experiment_name": "toy", "tracking_uri": uri}
    assert run_job(check_job(job("mlflow", node))) == 0
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    assert len(runs) == 2
    steps = sorted(entry.step for run in runs for entry in client.get_metric_history(run.info.run_id, "val/loss"))
    assert steps[-1] == 32 and 16 in steps
    pictures = list((tmp_path / "mlruns").rglob("*.png"))
    assert any("24x24" in str(path) or "24x24" in path.name for path in pictures) and len(pictures) >= 2


@pytest.mark.loggers
def test_wandb_has_numbers_and_pictures_offline(job, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    node = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "toy", "name": "run", "id": "run"}
    config = job("wandb", {**node, "resume": "allow", "save_dir": str(tmp_path), "offline": True})
    assert run_job(check_job(config)) == 0
    assert list((tmp_path / "wandb").rglob("*.png"))
    assert list((tmp_path / "wandb").rglob("*.wandb"))


@pytest.mark.loggers
def test_trackio_has_numbers_and_pictures(job, tmp_path):
    """In a process of its own: the package fixes where its files lie when it is imported."""
    node = {"_target_": "hdm_lightning.training.trackio_logger.TrackioLogger", "project": "toy", "name": "run"}
    content = json.dumps(job("trackio", node), default=str)
    (tmp_path / "job.json").write_text(content)
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from composed import check_job, run_job\n"
        "sys.exit(run_job(check_job(json.load(open(sys.argv[2])))))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    tests = str(Path(__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-c", program, tests, str(tmp_path / "job.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert list((tmp_path / "trackio").rglob("*.png"))
