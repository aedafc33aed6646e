"""Captions padded to few lengths: the losses, gradients and samples of those padded to one, and exact resuming."""

from functools import partial

import lightning as L
import pytest
import torch

from hdm_lightning import XUT, FlowModule, load_autoencoder, load_text_encoder

LENGTHS, DROP = [2, 5], {"drop": 0.4}
"""Captions have six words or, dropped, one padding token; the context has eight places where nothing else is said."""


class Note(L.Callback):
    """Notes each sample's loss, the shapes of captions, and the gradients of the first step."""

    def __init__(self):
        self.losses, self.shapes, self.full, self.gradients = {}, [], [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses |= dict(zip(batch["index"].tolist(), outputs["sample_losses"].tolist(), strict=True))
        self.shapes.append(batch["tokens"].shape[1])
        self.full.append(batch.get("text_is_full", False))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradients is None:
            self.gradients = {name: each.grad.clone() for name, each in pl_module.network.named_parameters()}


@pytest.fixture
def exact_step(tiny_text_encoder, tiny_autoencoder, trainer, shard_data, flow_module):
    """Function of `text_lengths` that takes one step of four micro-batches in float64 and gives what it noted."""
    network = flow_module().network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    encoders = load_text_encoder(str(tiny_text_encoder)), load_autoencoder(str(tiny_autoencoder))
    for encoder in encoders:
        encoder.model.double()

    def step(text_lengths, context):
        copied, noted = XUT(network.config), Note()
        copied.load_state_dict(network.state_dict())
        module = FlowModule(copied, *encoders, learning_rate=0.2, seed=3)
        settings = {"max_steps": 1, "accumulate_grad_batches": 4, "precision": "64-true", "limit_val_batches": 0}
        data = shard_data(text_lengths=text_lengths, captions=DROP, context_length=context)
        trainer(callbacks=[noted], **settings).fit(module, data)
        return noted

    return step


@pytest.mark.parametrize("context", [8, 6])
def test_losses_and_gradients_are_those_of_the_padded_form(exact_step, context):
    """Of captions that fill the context without a mask."""
    padded, bucketed = exact_step("padded", context), exact_step(LENGTHS, context)
    assert padded.shapes == [context] * 4 and set(bucketed.shapes) == {2, context}
    assert any(bucketed.full) == (context == 6) and not any(padded.full)
    assert sorted(padded.losses) == sorted(bucketed.losses) == list(range(16))
    for index, loss in padded.losses.items():
        assert bucketed.losses[index] == pytest.approx(loss, rel=1e-12)
    for name, gradient in padded.gradients.items():
        torch.testing.assert_close(bucketed.gradients[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dies_after", [3, 5, 6])
def test_killed_and_resumed_equals_uninterrupted(
    flow_module, shard_data, trainer, note_steps, fails_after, weights_of, tmp_path, dies_after
):
    """Also in the midst of a step, whose micro-batches are then made anew of the same samples."""
    data = partial(shard_data, text_lengths=LENGTHS, captions=DROP)
    whole = flow_module()
    trainer(limit_val_batches=0).fit(whole, data())
    saves = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    build = partial(trainer, enable_checkpointing=True, limit_val_batches=0)
    fails_after(dies_after, lambda dying: build(callbacks=[saves, dying]).fit(flow_module(), data()))
    module = flow_module()
    build(callbacks=[note_steps]).fit(module, data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert torch.equal(weights_of(module), weights_of(whole))
    first = dies_after // 2 * 8
    assert note_steps.samples(dies_after // 2) == list(range(first, 48))


@pytest.mark.parametrize(("limit", "together"), [(1.0, 2), (4, 2), (3, 1)])
def test_nothing_is_sorted_where_an_epoch_may_end_within_a_step(shard_data, flow_module, trainer, limit, together):
    """Three micro-batches are a step and a half; the next epoch begins behind the positions of three in order."""
    data, seen = shard_data(text_lengths=LENGTHS, captions=DROP), []

    class See(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.extend(batch["index"].tolist())

    fit = trainer(callbacks=[See()], max_steps=4, limit_train_batches=limit, limit_val_batches=0)
    fit.fit(flow_module(), data)
    assert sorted(seen) == list(range(len(seen)))
    assert (seen == sorted(seen)) == (together == 1)
    assert fit.train_dataloader.together == together


def test_a_cpu_keeps_one_length_unless_it_is_asked(shard_data, flow_module, trainer):
    lengths = []
    for changes in ({}, {"text_lengths": "bucketed"}):
        fit = trainer(max_steps=1, limit_val_batches=0)
        fit.fit(flow_module(), shard_data(**changes))
        lengths.append(fit.train_dataloader.lengths)
    assert lengths == [(), (8,)]
