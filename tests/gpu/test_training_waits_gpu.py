"""A whole training on CUDA, as `hdm-train` runs it: between two looks at the loss, no step waits for the device."""

import pytest
import torch
from lightning import Callback

from composed import check_job, run_job, tiny_job

pytestmark = pytest.mark.gpu
FIRST, LAST = 24, 36
"""Micro-batches of the steps 13 to 18: the guard looks at every tenth step, and every twentieth is logged."""


class NoWaits(Callback):
    """Makes every wait for the device an error, from one micro-batch's start to another's."""

    seen = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Begin, or end."""
        modes = {FIRST: "error", LAST: "default"}
        if NoWaits.seen in modes:
            torch.cuda.set_sync_debug_mode(modes[NoWaits.seen])
        NoWaits.seen += 1


@pytest.mark.parametrize("cached", [False, True])
def test_no_step_waits_for_the_device(tmp_path, tiny_text_encoder, tiny_autoencoder, tiny_shards, cached):
    """With captions encoded in the step, and with a text encoder that keeps them in memory."""
    trainer = {"accelerator": "cuda", "devices": 1, "precision": "auto"}
    config = tiny_job(tmp_path, tiny_shards, tiny_text_encoder, tiny_autoencoder, "torch.optim.AdamW", trainer)
    config["text_encoder"]["cache_size"] = 1000 if cached else 0
    config["callbacks"]["no_waits"] = {"_target_": f"{__name__}.NoWaits"}
    config["schedule"]["stages"]["px16"]["samples"] = 160
    NoWaits.seen = 0
    try:
        assert run_job(check_job(config)) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert NoWaits.seen == 40
