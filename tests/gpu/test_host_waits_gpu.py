"""A whole training step on CUDA, compiled and not: nothing in it waits for the device, and padding changes nothing."""

from types import SimpleNamespace

import pytest
import torch

from hdm_lightning import XUT, FlowModule, XUTConfig, load_autoencoder, load_text_encoder
from hdm_lightning.encoders.base import compile_encoders
from hdm_lightning.encoders.text_whitening import TextWhitening, WhitenedTextEncoder
from hdm_lightning.training.modules.flow_step import SideStream
from hdm_lightning.training.strategies.parallelize import prepare_network

pytestmark = pytest.mark.gpu
CONFIG = XUTConfig(
    patch_size=1, width=128, mlp_width=192, heads=2, head_dim=64, context_width=16, depth=1, decoder_blocks=2
)


@pytest.fixture
def module(tiny_text_encoder, tiny_autoencoder):
    """The module on the device, without a trainer but for what a step asks of it."""
    text, vae = load_text_encoder(str(tiny_text_encoder)), load_autoencoder(str(tiny_autoencoder))
    torch.manual_seed(0)
    network = XUT(CONFIG)
    with torch.no_grad():
        network.output_projection.weight.normal_(std=0.1)
    text = WhitenedTextEncoder(text, TextWhitening(torch.zeros(16).double(), torch.eye(16).double()))
    module = FlowModule(network, text, vae, learning_rate=0.1).cuda()
    module.encoders.to(torch.device("cuda", torch.cuda.current_device()))
    trainer = {"accumulate_grad_batches": 1, "world_size": 1, "training": True, "datamodule": None, "profiler": None}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    module._trainer = SimpleNamespace(**trainer, optimizers=[optimizer], progress_bar_callback=None)
    module.log = lambda *_args, **_kwargs: None
    return module


def batch_on_device(module, places=8, full=False):
    draw = torch.Generator().manual_seed(1)
    lengths = torch.full((4,), places) if full else torch.tensor([3, 5, 8, 1])
    tokens = torch.randint(2, 10, (4, places), generator=draw)
    batch = {
        "image": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=draw),
        "crop": torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(4, 1),
        "tokens": tokens.masked_fill(torch.arange(places) >= lengths[:, None], 0),
        "lengths": lengths,
        "index": torch.arange(4),
        "weight": torch.ones(4),
        "text_is_full": full,
    }
    drawn = module.on_before_batch_transfer(batch, 0)
    assert drawn["noise"].is_pinned()
    return moved(drawn)


def moved(batch):
    return {
        key: value.to("cuda", non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }


def step(module, batch):
    with torch.autocast("cuda", torch.bfloat16):
        outputs = module.training_step(batch, 0)
    outputs["loss"].backward()
    optimizer = module._trainer.optimizers[0]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return outputs


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_a_training_step_does_not_wait_for_the_device(module, compiled, full):
    if compiled:
        prepare_network(module.network, compiled=True)
        compile_encoders(module.text_encoder, module.autoencoder)
    batch = batch_on_device(module, full=full)
    for _ in range(2):  # graphs, kernels and moments are made in the first
        step(module, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(module, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_encoding_ahead_of_a_step_does_not_wait_for_the_device(module):
    stream = SideStream(torch.device("cuda", torch.cuda.current_device()))
    on_device = batch_on_device(module)
    batch = {key: value.cpu().pin_memory() if torch.is_tensor(value) else value for key, value in on_device.items()}

    def taken():
        autocast = torch.autocast("cuda", torch.bfloat16)
        return step(module, module.encoded_ahead(stream, lambda: moved(batch), autocast))["sample_losses"]

    for _ in range(2):  # kernels and moments are made in the first
        taken()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = taken()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(losses).all())


def test_columns_of_padding_change_nothing(module):
    short, long = batch_on_device(module, 8), batch_on_device(module, 8)
    long["tokens"] = torch.nn.functional.pad(long["tokens"], (0, 24))
    with torch.no_grad():
        losses = [module.training_step(batch, 0)["sample_losses"] for batch in (short, long)]
    torch.testing.assert_close(*losses, rtol=2e-3, atol=2e-3)
