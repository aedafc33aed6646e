"""A run's numbers and pictures in the loggers of other packages, each of which must be installed and is read back.

The numbers are compared with those of Lightning's CSV logger in the same run.
"""

import csv
import json
import os
import sqlite3
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
        beside = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path / "csv"), "name": "toy"}
        return {**config, "logger": {name: node, "csv": beside}}

    return configuration


def of_csv(tmp_path):
    """Validation losses by the samples seen, as the CSV files have them, which have no more."""
    tables = [csv.DictReader(path.open()) for path in sorted((tmp_path / "csv").rglob("metrics.csv"))]
    rows = [row for table in tables for row in table if row.get("val/loss")]
    found = {(int(row["step"]), float(row["val/loss"])) for row in rows}
    assert {16, 32} <= {step for step, _ in found}
    return found


def of_wandb(path):
    """The same from a run's file: a log of LevelDB's form, blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, record, found = path.read_bytes(), 7, b"", set()
    while at + 7 <= len(content):
        left, size, kind = 32768 - at % 32768, int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if left < 7 or kind == 0:  # the rest of the block is empty
            at += left
            continue
        record, at = record + content[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            items = wandb_internal_pb2.Record.FromString(record).history.item
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in items}
            if "val/loss" in row:
                found.add((int(row["trainer/global_step"]), float(row["val/loss"])))
            record = b""
    return found


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
    history = [entry for run in runs for entry in client.get_metric_history(run.info.run_id, "val/loss")]
    assert {(entry.step, entry.value) for entry in history} == of_csv(tmp_path)
    pictures = list((tmp_path / "mlruns").rglob("*.png"))
    assert any("24x24" in str(path) or "24x24" in path.name for path in pictures) and len(pictures) >= 2


@pytest.mark.loggers
def test_wandb_has_numbers_and_pictures_offline(job, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    node = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "toy", "name": "run", "id": "run"}
    config = job("wandb", {**node, "resume": "allow", "save_dir": str(tmp_path), "offline": True})
    assert run_job(check_job(config)) == 0
    wandb.finish()  # as the end of the process does, which the file is written to the end by
    assert list((tmp_path / "wandb").rglob("*.png"))
    files = list((tmp_path / "wandb").rglob("*.wandb"))
    assert set().union(*map(of_wandb, files)) == of_csv(tmp_path)


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
    with sqlite3.connect(tmp_path / "trackio" / "toy.db") as database:
        rows = [(step, json.loads(metrics)) for step, metrics in database.execute("SELECT step, metrics FROM metrics")]
    assert {(step, row["val/loss"]) for step, row in rows if "val/loss" in row} == of_csv(tmp_path)
