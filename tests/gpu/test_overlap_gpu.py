"""Encoders on a CUDA stream of their own: they run while the device is busy, and the losses are the sequential ones."""

import lightning as L
import pytest
import torch

from hdm_lightning import XUT, FlowModule, ShardDataModule, XUTConfig, load_autoencoder, load_text_encoder
from hdm_lightning.training.modules.flow_step import SideStream

pytestmark = pytest.mark.gpu
BUSY = 2_000_000_000
"""Cycles that the device is kept busy: about a second."""


@pytest.fixture
def device():
    """The present one."""
    return torch.device("cuda", torch.cuda.current_device())


def test_what_is_put_on_the_stream_does_not_wait_for_the_current_one(device):
    side, source = SideStream(device), torch.ones(1 << 20).pin_memory()
    torch.ones(8, device=device).sum()  # what the first kernel loads is loaded
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY)
    busy = torch.cuda.Event()
    busy.record()
    with side.put():
        doubled = source.to(device, non_blocking=True) * 2
        done = torch.cuda.Event()
        done.record()
    side.take_over([doubled])
    done.synchronize()
    assert not busy.query()
    assert float(doubled.sum()) == 2 << 20 and busy.query()  # the current stream came to it after its own work


def test_memory_is_not_reused_before_the_current_stream_has_read_it(device):
    side = SideStream(device)
    with side.put():
        first = torch.full((1 << 20,), 1.0, device=device)
    side.take_over([first])
    torch.cuda._sleep(BUSY)
    total = first.sum()
    del first
    with side.put():
        second = torch.full((1 << 20,), 5.0, device=device)
    assert float(total) == 1 << 20
    assert float(second[0]) == 5.0


class NoteLosses(L.Callback):
    """Notes the losses of every micro-batch."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Those of one more."""
        self.losses.append(outputs["sample_losses"])


@pytest.fixture
def losses(tiny_text_encoder, tiny_autoencoder, tiny_shards, tmp_path):
    """Function of whether to overlap that gives the losses of a short training."""
    config = XUTConfig(
        patch_size=1, width=128, mlp_width=192, heads=2, head_dim=64, context_width=16, depth=1, decoder_blocks=2
    )

    def train(overlapped):
        text, vae, noted = (
            load_text_encoder(str(tiny_text_encoder)),
            load_autoencoder(str(tiny_autoencoder)),
            NoteLosses(),
        )
        torch.manual_seed(0)
        module = FlowModule(XUT(config), text, vae, learning_rate=0.2, overlap_encoders=overlapped)
        sizes = {"resolution": 32, "batch_size": 4, "context_length": 8, "num_workers": 0}
        data = ShardDataModule(str(tiny_shards), tokenizer=text.tokenizer, **sizes)
        steps = {"max_steps": 10, "accumulate_grad_batches": 2, "precision": "bf16-mixed"}
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        where = {"accelerator": "cuda", "devices": 1, "default_root_dir": tmp_path}
        L.Trainer(callbacks=[noted], **steps, **quiet, **where).fit(module, data)
        return torch.stack(noted.losses)

    return train


def test_a_training_with_overlap_has_the_losses_of_one_without(losses):
    expected, found = losses(False), losses(True)
    assert len(expected) == 20
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
