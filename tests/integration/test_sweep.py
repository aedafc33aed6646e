"""A sweep of four toy jobs, one of which crashes: the others are not harmed, a rerun does only what is left."""

import csv
import json
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from hdm_lightning.cli.hydra_app import run_hydra
from hdm_lightning.cli.train import train
from hdm_lightning.training.callbacks.ends import ValidateAtEnds
from hdm_lightning.training.run_folder import is_finished

JOBS = {(seed, residual) for seed in (0, 1) for residual in ("input", "normed")}


@pytest.fixture(scope="module")
def folder(toy_job, tmp_path_factory):
    """Folder with a configuration directory of one toy experiment."""
    folder = tmp_path_factory.mktemp("sweep")
    config = toy_job("unused", px16={"samples": 16, "validate_every": 0, "save_every": 0})
    schedule = config.pop("schedule")
    del config["run_dir"], config["name"]
    config.setdefault("callbacks", {})["sample_images"] = {"prompts": []}
    for group, name, content in (("schedule", "toy", schedule), ("experiment", "toy", config)):
        (folder / "conf" / group).mkdir(parents=True)
        (folder / "conf" / group / f"{name}.yaml").write_text(yaml.safe_dump(content))
    path = folder / "conf" / "experiment" / "toy.yaml"
    path.write_text("# @package _global_\n" + yaml.safe_dump({"defaults": [{"override /schedule": "toy"}], **config}))
    return folder


def sweep(patch, folder):
    arguments = ["--config-dir", str(folder / "conf"), "-m", "experiment=toy", f"hydra.sweep.dir={folder / 'jobs'}"]
    patch.setattr(sys, "argv", ["hdm-train", *arguments, "seed=0,1", "model.residual=normed,input"])
    return run_hydra(train, "train")


def rows(folder):
    with (folder / "jobs" / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def exported(folder):
    return {
        path.parent.parent.name: path.stat().st_mtime_ns for path in (folder / "jobs").glob("*/final/model_index.json")
    }


def test_a_sweep_with_a_crashing_job_and_its_rerun(folder, capfd):
    with pytest.MonkeyPatch.context() as patch:
        original = ValidateAtEnds.on_step_end

        def crash(self, trainer, module, step):
            if module.seed == 0 and module.network.config.residual == "input":
                raise RuntimeError("a made-up defect")
            original(self, trainer, module, step)

        patch.setattr(ValidateAtEnds, "on_step_end", crash)
        assert sweep(patch, folder) == 1
    said = capfd.readouterr()
    assert "3 of 4 jobs done, 1 failed" in said.out
    assert "Traceback" in said.err
    first = rows(folder)
    assert [row["status"] for row in first] == ["done"] * 3 + ["failed"]
    assert (first[-1]["seed"], first[-1]["model.residual"]) == ("0", "input")
    assert first[-1]["error"] == "RuntimeError: a made-up defect"
    assert first[-1]["objective"] == ""
    before = exported(folder)
    assert len(before) == 3

    with pytest.MonkeyPatch.context() as patch:
        assert sweep(patch, folder) == 0
    said = capfd.readouterr().out
    assert said.count("already finished: skipped") == 3
    assert "4 of 4 jobs done, 0 failed" in said
    after = exported(folder)
    assert {name: after[name] for name in before} == before
    check_summary(folder)


@pytest.mark.parametrize("kind", ["model", "autoencoder"])
def test_a_job_is_finished_when_the_file_that_is_written_last_is_there(tmp_path, kind):
    """In the order in which `save_final` (in the layout of before, too) and `export_autoencoder` write them."""
    names = {
        "model": ["model.safetensors", "model_raw.safetensors", "README.md", "config.json"],
        "autoencoder": ["config.json", "diffusion_pytorch_model.safetensors", "measures.json", "README.md"],
    }
    (tmp_path / "final").mkdir()
    for name in names[kind]:
        assert not is_finished(tmp_path)
        (tmp_path / "final" / name).touch()
    assert is_finished(tmp_path)


def check_summary(folder):
    found = rows(folder)
    assert {(int(row["seed"]), row["model.residual"]) for row in found} == JOBS
    objectives = [float(row["objective"]) for row in found]
    assert objectives == sorted(objectives)
    for row in found:
        done = json.loads((folder / "jobs" / row["job"] / "01-px16" / "done.json").read_text())["validation"]
        assert float(row["objective"]) == pytest.approx(done["ema_16"], rel=1e-6)  # the first average is exported
        assert float(row["raw"]) == pytest.approx(done["raw"], rel=1e-6)
        assert row["baseline"] == ("yes" if row["model.residual"] == "input" else "")  # the default of conf/model
        assert float(row["device_hours"]) > 0
        assert row["error"] == ""
    told = (folder / "jobs" / "summary.md").read_text()
    for residual in ("input", "normed"):
        values = [float(row["objective"]) for row in found if row["model.residual"] == residual]
        mark = " **(baseline)**" if residual == "input" else ""
        mean, spread = np.mean(values), np.std(values, ddof=1)
        assert f"| model.residual={residual}{mark} | 2 | {mean:.5g} | {spread:.2g} |" in told
    with Image.open(folder / "jobs" / "summary.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
