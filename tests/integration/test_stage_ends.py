"""What ends a stage before its samples are spent, and what a stage's end leaves however it came about."""

from pathlib import Path

import pytest
import torch

from composed import check_job, done_of, run_job, saved_in, scalars_of, weights_of
from crash import Crash
from hdm_lightning.errors import UserError
from hdm_lightning.training import run_folder

NEVER_GOOD_ENOUGH = {"validate_every": 8, "stop": {"plateau_samples": 8, "plateau_delta": 1e9}}


@pytest.fixture
def job(toy_job, tmp_path):
    """Makes the configuration of a run with pictures and stored averages in a folder of its own."""

    def make(name="run", trainer=None, **stages):
        config = toy_job(tmp_path / name, **stages)
        config["hardware"] |= trainer or {}
        config["callbacks"]["sample_images"] = {"prompts": ["red circle"], "steps": 1, "aspect_ratios": [1.0]}
        config["callbacks"]["weight_averages"] |= {"sigma_rel": [0.1]}
        return config

    return make


def test_a_plateau_ends_a_stage_with_all_that_a_stage_s_end_has(job):
    """Steps of 8 samples: the best loss counts from the first one, 8 samples on the second one ends the stage."""
    config = job(px16={**NEVER_GOOD_ENOUGH, "validate_every": 8, "sample_every": 0}, px24={"samples": 8})
    assert run_job(check_job(config)) == 0
    assert (done_of(config)["steps"], done_of(config)["samples"]) == (2, 16)
    assert done_of(config)["ended_by"] == "no improvement over 8 samples"
    assert (done_of(config, "02-px24")["steps"], done_of(config, "02-px24")["ended_by"]) == (1, "samples")
    run_dir = Path(config["run_dir"])
    assert [path.name for path in (run_dir / "01-px16" / "samples").iterdir()] == ["000000000016-16x16.png"]
    assert sorted(path.name[:12] for path in (run_dir / "ema_snapshots").iterdir()) == ["000000000016", "000000000024"]
    assert [path.name for path in saved_in(run_dir, "01-px16")] == ["step-00000002.ckpt"]
    assert [event.step for event in scalars_of(config, "val/loss")] == [0, 8, 16]


@pytest.mark.parametrize(
    ("stop", "reason"), [({"max_hours": 1e-9}, "max_hours"), ({"max_cost_usd": 1e-9}, "max_cost_usd")]
)
def test_a_budget_ends_a_stage_and_the_end_is_validated(job, stop, reason):
    """Nothing is validated after step 1 but because it is the last one."""
    price = {"usd_per_device_hour": 2.0}
    config = job(trainer=price, px16={"stop": stop, "validate_every": 0})
    whole = job("whole", trainer=price, px16={"validate_every": 8})
    assert run_job(check_job(config)) == run_job(check_job(whole)) == 0
    assert done_of(config)["steps"] == 1 and done_of(config)["ended_by"].startswith(reason)
    _, after_one, *_ = (event.value for event in scalars_of(whole, "val/loss_ema_16"))
    assert done_of(config)["validation"]["ema_16"] == pytest.approx(after_one, rel=1e-6)


@pytest.mark.parametrize("stage", [{"samples": 16}, NEVER_GOOD_ENOUGH], ids=["samples", "plateau"])
def test_killed_before_the_end_was_noted(job, stage, monkeypatch):
    """The last checkpoint is there, the note is not: no step is added, and the final losses are not lost."""
    whole, killed = job("whole", px16=stage), job("killed", px16=stage)
    assert run_job(check_job(whole)) == 0
    with monkeypatch.context() as patch:

        def crash(*arguments):
            raise Crash

        patch.setattr(run_folder, "mark_stage_done", crash)
        with pytest.raises(Crash):
            run_job(check_job(killed))
    assert run_job(check_job(killed)) == 0
    kept = ("steps", "ended_by", "validation")
    assert {key: done_of(whole)[key] for key in kept} == {key: done_of(killed)[key] for key in kept}
    assert set(done_of(killed)["validation"]) == {"raw", "ema_16", "ema_64", "power_0.100"}
    weights = weights_of(killed)
    assert all(torch.equal(weights[name], value) for name, value in weights_of(whole).items())


@pytest.mark.parametrize(
    ("changes", "trainer", "key"),
    [
        ({"stop": {"max_hours": 0.0}}, {}, "stop.max_hours"),
        ({"stop": {"max_cost_usd": 5.0}}, {}, "stop.max_cost_usd"),
        ({"stop": {"plateau_samples": 0}}, {}, "stop.plateau_samples"),
        ({"stop": {"plateau_samples": 16}, "validate_every": 24}, {}, "stop.plateau_samples"),
        ({"stop": {"plateau_samples": 16}, "validate_every": 0}, {}, "stop.plateau_samples"),
        ({"stop": {"plateau_samples": 16, "plateau_delta": -1.0}, "validate_every": 8}, {}, "stop.plateau_delta"),
    ],
)
def test_an_end_that_would_never_come_is_named(job, changes, trainer, key):
    with pytest.raises(UserError) as caught:
        check_job(job(trainer=trainer, px16=changes))
    assert caught.value.where == f"schedule.stages.px16.{key}"


def test_a_plateau_needs_validation_samples(job):
    config = job(px16=NEVER_GOOD_ENOUGH)
    config["validation"]["samples"] = 0
    with pytest.raises(UserError, match="no loss") as caught:
        check_job(config)
    assert caught.value.hint == "set validation.samples"
