"""A stage trained in float16 on a CUDA device: the scaler, clipping and resume."""

import pytest

from composed import OPTIMIZERS, check_job, done_of, run_job, tiny_job

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stage_in_float16_learns_as_in_float32(tmp_path, tiny_text_encoder, tiny_autoencoder, tiny_shards, optimizer):
    losses = {}
    for precision in ("32-true", "16-mixed"):
        trainer = {"accelerator": "cuda", "devices": 1, "precision": precision}
        config = tiny_job(tmp_path / precision, tiny_shards, tiny_text_encoder, tiny_autoencoder, optimizer, trainer)
        assert run_job(check_job(config)) == 0
        losses[precision] = done_of(config)["validation"]["raw"]
    assert losses["16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)
