"""A whole training step waits for no device: seen without one, on tensors of the meta device, which have no values."""

from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hdm_lightning import XUT, FlowModule, XUTConfig, load_autoencoder, load_text_encoder
from hdm_lightning.encoders.text_whitening import TextWhitening, WhitenedTextEncoder

CONFIG = XUTConfig(
    patch_size=1, width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=1, decoder_blocks=2
)
aten = torch.ops.aten


class NoWaits(TorchDispatchMode):
    """Raises where a value is read, or where data come from or go to memory of the host, which waits for the stream."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default):
            raise AssertionError(f"{func} waits for the device")
        indexed = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
        if indexed and any(each is not None and each.device != args[0].device for each in args[1]):
            raise AssertionError(f"{func} fetches indices and waits for the device")
        found = func(*args, **(kwargs or {}))
        if func in (aten._to_copy.default, aten.copy_.default) and not (kwargs or {}).get("non_blocking"):
            source = args[0] if func is aten._to_copy.default else args[1]
            if source.device.type != found.device.type:
                raise AssertionError(f"{func} from {source.device} to {found.device} waits for the device")
        return found


class NoLists(TorchFunctionMode):
    """Raises where a list becomes a tensor of a device, for which the host waits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (
            func in (torch.tensor, torch.as_tensor)
            and torch.device((kwargs or {}).get("device") or "cpu").type != "cpu"
        ):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def step(tiny_text_encoder, tiny_autoencoder, monkeypatch):
    """Function that takes a training step, backward pass included, with a batch changed by a function."""
    autocast = torch.autocast  # which the meta device does not have
    monkeypatch.setattr(torch, "autocast", lambda device, *args, **kwargs: autocast("cpu", *args, **kwargs))

    def taken(change=lambda batch: batch, whitened=False):
        text = load_text_encoder(str(tiny_text_encoder), dtype="float32")
        vae = load_autoencoder(str(tiny_autoencoder), dtype="float32")
        if whitened:
            text = WhitenedTextEncoder(text, TextWhitening(torch.zeros(16), torch.eye(16)))
        module = FlowModule(XUT(CONFIG), text, vae, learning_rate=0.1)
        host, logged = batch_on_host(module), {}
        module.to("meta")
        module.encoders.to(torch.device("meta"))
        batch = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in host.items()}
        optimizer = torch.optim.SGD(module.network.parameters(), lr=0.1)
        module._trainer = SimpleNamespace(optimizers=[optimizer], progress_bar_callback=None, profiler=None)
        module.log = lambda name, value, **_: logged.update({name: value})
        with NoLists(), NoWaits(), autocast("cpu", torch.bfloat16):
            outputs = module.training_step(change(batch), 0)
            outputs["loss"].backward()
        return outputs, logged

    return taken


def batch_on_host(module):
    module._trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, training=True, datamodule=None)
    batch = {
        "image": torch.zeros(3, 3, 16, 16, dtype=torch.uint8),
        "crop": torch.tensor([[0.0, 0.0, 16.0, 16.0]]).repeat(3, 1),
        "tokens": torch.ones(3, 8, dtype=torch.int64),
        "lengths": torch.tensor([3, 5, 8]),
        "index": torch.arange(3),
        "weight": torch.ones(3),
        "keys": ["a", "b", "c"],
        "captions": [""] * 3,
    }
    return module.on_before_batch_transfer(batch, 0)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_a_training_step_waits_for_nothing(step, full, whitened):
    outputs, logged = step(lambda batch: {**batch, "text_is_full": full}, whitened)
    assert outputs["sample_losses"].shape == (3,) and outputs["loss"].is_meta
    assert set(logged) == {"train/loss", "lr"} and all(each.is_meta for each in logged.values())


@pytest.mark.parametrize(
    "waits",
    [
        lambda lengths: lengths.max().item(),
        lambda lengths: lengths.tolist(),
        lambda lengths: bool((lengths > 0).all()),
        lambda lengths: float(lengths[0]),
        lambda lengths: lengths.cpu(),
        lambda lengths: torch.zeros(3).to(lengths.device),
        lambda lengths: torch.tensor([1, 2], device=lengths.device),
        lambda lengths: lengths[torch.tensor([2, 0])],
        lambda lengths: lengths.nonzero(),
    ],
)
def test_what_would_wait_is_seen(step, waits):
    def change(batch):
        waits(batch["lengths"])
        return batch

    with pytest.raises(Exception, match=r"waits for the device|out of meta tensor"):
        step(change)
