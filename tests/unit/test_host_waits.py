"""A whole training step waits for no device: seen without one, on tensors of the meta device, which have no values."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel

from hdm_lightning import XUT, FlowModule, XUTConfig, load_autoencoder, load_text_encoder
from hdm_lightning.encoders.caches import CachedTextEncoder
from hdm_lightning.encoders.text import TransformersTextEncoder
from hdm_lightning.encoders.text_whitening import TextWhitening, WhitenedTextEncoder
from hdm_lightning.training.callbacks.loss_guard import LossGuard
from hdm_lightning.training.callbacks.step_metrics import DataSeen, LossByTime, Norms
from hdm_lightning.training.callbacks.throughput import Throughput
from hdm_lightning.training.callbacks.usable_samples import EARLY_SAMPLES, UsableSamples
from hdm_lightning.training.callbacks.weight_averages import WeightAverages
from hdm_lightning.training.modules.flow_step import FrozenEncoders

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
        tensors = [each for each in tree_leaves((args, kwargs)) if torch.is_tensor(each) and each.dim()]
        if len({each.device.type for each in tensors}) > 1 and func is not aten.copy_.default:
            raise AssertionError(f"{func} mixes tensors of the host and of the device")
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

    def taken(change=lambda batch: batch, whitened=False, text=None):
        text = text or load_text_encoder(str(tiny_text_encoder), dtype="float32")
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


def bidirectional():
    """A text encoder that needs a mask, as MiniLM does."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return TransformersTextEncoder(AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=40, **sizes)))


def test_a_text_encoder_that_needs_a_mask_waits_for_nothing(step):
    step(text=bidirectional())


def test_captions_kept_in_memory_are_looked_up_before_the_batch_leaves_it(step, monkeypatch):
    """On a device, reading their tokens would wait; so it is the states that go there."""
    text = bidirectional()
    cached, batches = CachedTextEncoder(text, 10), []
    monkeypatch.setattr(FlowModule, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(CachedTextEncoder, "to", lambda cached, device: cached)  # its entries stay in RAM

    def change(batch):
        batches.append(batch)
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(FlowModule, "log_step", lambda *args, **kwargs: None)
        step(change, text=cached)
    assert batches[0]["context"].is_meta and cached.misses == 3
    lengths, tokens = torch.tensor([3, 5, 8]), torch.ones(3, 8, dtype=torch.int64)
    torch.testing.assert_close(cached.encode(tokens, lengths), text.encode(tokens, lengths))
    assert (cached.hits, cached.misses) == (3, 3)


def test_captions_kept_in_memory_keep_no_graph():
    """As a text encoder of one's own may not be frozen."""
    states = torch.ones(1, 1, 4, requires_grad=True)
    text = SimpleNamespace(width=4, encode=lambda tokens, lengths: states.expand(*tokens.shape, 4) * 2)
    batch = {"tokens": torch.ones(2, 3, dtype=torch.int64), "lengths": torch.tensor([3, 2])}
    context = FrozenEncoders(CachedTextEncoder(text, 10), None).cached_context(batch)["context"]
    assert context.shape == (2, 3, 4) and not context.requires_grad


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
        lambda lengths: torch.ones(2, 3, dtype=torch.int64) @ lengths,
    ],
)
def test_what_would_wait_is_seen(step, waits):
    def change(batch):
        waits(batch["lengths"])
        return batch

    with pytest.raises(Exception, match=r"waits for the device|out of meta tensor|of the host and of the device"):
        step(change)


ON_CUDA = SimpleNamespace(device=SimpleNamespace(type="cuda"))
"""The module of a callback that looks at every step elsewhere."""


@pytest.fixture
def trained():
    """A network on the meta device with gradients, an optimizer, and a trainer between two logs."""
    network = XUT(CONFIG).to("meta")
    module = SimpleNamespace(network=network, parameters=network.parameters, device=torch.device("meta"))
    module.samples_trained, module.routing_rate, module.autoencoder = 40, 0.5, SimpleNamespace(factor=4)
    module.fed_tokens = lambda batch: batch["tokens"]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    quiet = SimpleNamespace(should_update_logs=False)
    trainer = SimpleNamespace(global_step=5, world_size=1, training=True, _logger_connector=quiet)
    trainer.profiler = PassThroughProfiler()
    return module, optimizer, trainer


def test_what_follows_a_training_step_waits_for_nothing(trained):
    """Clipping, optimizer and callbacks, in a step that is neither logged nor looked at."""
    module, optimizer, trainer = trained
    averages, early = WeightAverages([1000], sigma_rel=[0.1]), UsableSamples()
    averages.setup(trainer, module, "fit")
    callbacks = [early, LossGuard(), averages, Norms(), LossByTime(), DataSeen(), Throughput()]
    for each in callbacks:
        each.on_train_start(trainer, module)
    early._early = EARLY_SAMPLES  # as after the first steps
    batch = {"image": torch.zeros(3, 3, 16, 16, device="meta"), "tokens": torch.ones(3, 8, device="meta")}
    batch |= {"weight": torch.ones(3, device="meta"), "index": torch.arange(3, device="meta")}
    batch |= {"keys": ["a", "b", "c"], "caption_tokens": [3, 5, 8]}
    losses = torch.rand(3, device="meta")
    outputs = {"loss": losses.mean(), "sample_losses": losses, "times": torch.rand(3, device="meta")}
    callbacks[-1].on_train_batch_start(trainer, module, batch, 0)  # counts a network's operations, once a shape
    with NoLists(), NoWaits():
        for step in (5, 5, 6):  # two micro-batches, and the end of a step
            callbacks[-1].on_train_batch_start(trainer, module, batch, 0)
            if step == 6:
                for each in callbacks:
                    each.on_before_optimizer_step(trainer, module, optimizer)
                torch.nn.utils.clip_grad_norm_(module.network.parameters(), 1.0)
                optimizer.step()
                module.samples_trained += 8
            trainer.global_step = step
            for each in callbacks:
                seen = ON_CUDA if isinstance(each, LossGuard) else module
                each.on_train_batch_end(trainer, seen, outputs, batch, 0)
    assert averages.state.samples_seen == 8
    with pytest.raises(Exception, match="meta"), NoWaits():
        callbacks[1].look(SimpleNamespace(lightning_module=module))  # which does wait
