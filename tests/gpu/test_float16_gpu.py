"""A stage trained in float16 on a CUDA device: the scaler, clipping and resume."""

import json
from pathlib import Path

import pytest

from composed import check_job, run_job

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "hdm_lightning.training.optimization.muon.MuonAdamW"])
def test_a_stage_in_float16_learns_as_in_float32(tmp_path, tiny_text_encoder, tiny_autoencoder, tiny_shards, optimizer):
    losses = {}
    for precision in ("32-true", "16-mixed"):
        stage = {"resolution": 16, "samples": 512, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 0.05}
        config = {
            "name": "toy",
            "run_dir": str(tmp_path / precision),
            "model": {"patch_size": 1, "width": 64, "mlp_width": 96, "heads": 2, "head_dim": 32, "context_width": 16},
            "text_encoder": {"name": str(tiny_text_encoder)},
            "vae": {"name": str(tiny_autoencoder)},
            "data": {"train": str(tiny_shards), "num_workers": 0, "lanes": 4, "window": 4},
            "validation": {"samples": 8, "batch_size": 4},
            "optimizer": {"_target_": optimizer},
            "trainer": {"accelerator": "cuda", "devices": 1, "precision": precision},
            "callbacks": {"progress": None},
            "schedule": {"stages": {"px16": {**stage, "context_length": 8, "gradient_clip": 1.0}}},
        }
        assert run_job(check_job(config)) == 0
        done = json.loads((Path(config["run_dir"]) / "01-px16" / "done.json").read_text())
        losses[precision] = done["validation"]["raw"]
    assert losses["16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)
