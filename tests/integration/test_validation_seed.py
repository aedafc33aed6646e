"""Validation has a seed of its own: runs of any seed are validated on the same samples, noise and times."""

import copy
from pathlib import Path

import pytest
import torch

from composed import check_job, composed, run_job
from hdm_lightning import FlowModule
from hdm_lightning.cli import evaluate
from hdm_lightning.data.loader import ValidationLoader
from hdm_lightning.evaluation.subject import find_run
from hdm_lightning.training.composition import build
from hdm_lightning.training.recorded import read_recorded
from hdm_lightning.training.recorded_data import recorded_validation_stream
from hdm_lightning.training.run_recipe import with_stage


def equal(first, second):
    """Whether two batches hold the same, tensors bit for bit."""
    assert first.keys() == second.keys()
    return {
        key: torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        for key, value in first.items()
    }


@pytest.fixture
def validated(toy_job, tmp_path, monkeypatch):
    """Trains one step with a seed and a seed of the validation; gives what was validated and trained on first."""
    seen = {}
    validation_step, training_step = FlowModule.validation_step, FlowModule.training_step

    def validate(self, batch, batch_idx):
        seen.setdefault("validation", []).append(batch)
        return validation_step(self, batch, batch_idx)

    def train(self, batch, batch_idx):
        seen.setdefault("training", []).append(batch)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(FlowModule, "validation_step", validate)
    monkeypatch.setattr(FlowModule, "training_step", train)

    def run(seed, of_validation):
        seen.clear()
        config = toy_job(tmp_path / f"{seed}-{of_validation}", px16={"samples": 8, "validate_every": 0})
        config |= {"seed": seed, "validation": {"samples": 8, "batch_size": 8, "seed": of_validation}}
        assert run_job(check_job(config)) == 0
        return seen["validation"][0], seen["training"][0]

    return run


def test_the_run_s_seed_does_not_change_the_validation(validated):
    (validation, training), (other_validation, other_training) = validated(1, 0), validated(2, 0)
    assert all(equal(validation, other_validation).values())
    assert {"noise", "uniform", "image", "crop", "tokens", "captions"} <= validation.keys()
    trained = equal(training, other_training)
    assert not any(trained[key] for key in ("keys", "noise", "uniform", "image"))


def test_another_validation_seed_draws_other_samples_noise_and_times(validated):
    (validation, training), (other_validation, other_training) = validated(1, 0), validated(1, 7)
    found = equal(validation, other_validation)
    assert not any(found[key] for key in ("keys", "captions", "image", "noise", "uniform"))
    assert all(equal(training, other_training).values())


def test_an_autoencoder_s_runs_are_validated_on_the_same_pictures_too(toy_vae_config):
    def first(seed, of_validation):
        config = copy.deepcopy(toy_vae_config) | {"seed": seed}
        config["validation"]["seed"] = of_validation
        job = check_job(config)
        stage = with_stage(composed(config), job.plans[0], **job.recipe.stage_values(job.config, job.plans[0]))
        data = build(stage, "data", tokenizer=None)
        return next(iter(data.val_dataloader())), next(iter(data.train_dataloader()))

    (validation, training), (same, trained_otherwise) = first(1, 0), first(2, 0)
    assert all(equal(validation, same).values())
    assert not equal(training, trained_otherwise)["keys"]
    assert not equal(validation, first(1, 7)[0])["keys"]


def test_hdm_evaluate_compares_with_the_pictures_of_the_run_s_seed(toy_job, tmp_path, monkeypatch):
    """And a run that was written before validation had a seed is read as before."""
    config = toy_job(tmp_path / "run", px16={"samples": 8}) | {"seed": 5}
    assert run_job(check_job(config)) == 0
    path = Path(config["run_dir"], "config.yaml")
    path.write_text(path.read_text().replace("  batch_size: 4\n  seed: 0\n", "  batch_size: 4\n"))
    record = find_run(path.parent)
    assert record is not None and record.settings.validation.seed == 0
    assert "seed" not in read_recorded(path)["validation"]
    streams = []
    original = ValidationLoader.__init__

    def note(self, config, *arguments, **keywords):
        streams.append(config)
        original(self, config, *arguments, **keywords)

    monkeypatch.setattr(ValidationLoader, "__init__", note)
    line = ["--parts", "loss", "--weights", "raw", "--loss-samples", "4", "--time-bins", "1", "--samples", "4"]
    assert evaluate.main([str(path.parent), *line, "--resamples", "2", "--out", str(tmp_path / "out")]) == 0
    expected = recorded_validation_stream(record.settings, record.plan, None)
    assert [(one.seed, one.stage) for one in streams] == [(expected.seed, expected.stage)] == [(5, "validation")]
