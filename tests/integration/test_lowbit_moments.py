"""Moments of 8 bits: trained with, handed to the next stage, saved and resumed from."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from composed import check_job, end_of, run_job, saved_in
from hdm_lightning.training.checkpoint_io import network_weights

BOTH = {"batch_size": 8, "learning_rate": 1.0, "warmup_samples": 0, "resolution": 16}
WIDE = {"width": 64, "mlp_width": 96, "heads": 2, "head_dim": 32, "patch_size": 1}


def test_a_schedule_with_moments_of_8_bits_resumes_to_the_bit(tmp_path, toy_job, changed, monkeypatch):
    pytest.importorskip("torchao", reason="the extra lowbit is not installed")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # torchao compiles its step
    stages = {"first": {**BOTH, "samples": 64, "save_every": 32}, "second": {**BOTH, "samples": 32}}
    optimizer = {"_target_": "torchao.optim.AdamW8bit"}
    config = changed(
        toy_job(tmp_path / "run", **stages), optimizer=optimizer, model=WIDE, schedule={"carry_moments": True}
    )
    run_dir = Path(config["run_dir"])
    assert run_job(check_job(config)) == 0
    end = end_of(run_dir, "02-second")
    kinds = {type(moments["exp_avg"]).__name__ for moments in end["optimizer_states"][0]["state"].values()}
    assert "OptimState8bit" in kinds
    for path in (run_dir / "02-second", run_dir / "final"):
        shutil.rmtree(path)
    (run_dir / "01-first" / "done.json").unlink()
    saved_in(run_dir, "01-first")[-1].unlink()
    assert run_job(check_job(config)) == 0
    expected, found = (network_weights(each) for each in (end, end_of(run_dir, "02-second")))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
