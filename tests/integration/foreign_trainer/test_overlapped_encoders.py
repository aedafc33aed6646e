"""Encoders on a stream of their own: on a CPU the same numbers, position and resume, and all is handed over.

How a GPU's streams follow each other is in `tests/gpu/test_overlap_gpu.py`.
"""

from contextlib import contextmanager

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hdm_lightning import FlowModule
from hdm_lightning.training.modules import flow_module as flow_module_file
from hdm_lightning.training.modules.flow_step import FrozenEncoders, SideStream


class NoteLosses(L.Callback):
    """Notes the losses of every micro-batch, and the validation's."""

    def __init__(self):
        self.losses, self.validations = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Those of one more."""
        self.losses.append(outputs["sample_losses"])

    def on_validation_end(self, trainer, pl_module):
        """One more."""
        self.validations.append(float(trainer.callback_metrics["val/loss"]))


class RecordedStream(SideStream):
    """Notes what is made on the stream and what is taken over."""

    def __init__(self, device):
        super().__init__(device)
        self.is_open, self.taken = False, []

    @contextmanager
    def put(self):
        """Open it."""
        self.is_open = True
        yield
        self.is_open = False

    def take_over(self, tensors):
        """Note which."""
        self.taken = list(tensors)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_losses_are_those_of_the_sequential_way_to_the_last_bit(
    flow_module, shard_data, trainer, weights_of, precision
):
    """With two micro-batches a step, validations between them, and captions of all lengths."""
    found = []
    for overlapped in (False, True):
        module, noted = flow_module(overlap_encoders=overlapped), NoteLosses()
        trainer(callbacks=[noted], precision=precision).fit(module, shard_data())
        found.append((torch.stack(noted.losses), torch.tensor(noted.validations), weights_of(module)))
    assert len(found[0][0]) == 12 and len(found[0][1]) > 2
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dies_after", [3, 4, 7])
def test_killed_and_resumed_equals_uninterrupted(
    flow_module, shard_data, trainer, note_steps, fails_after, weights_of, tmp_path, dies_after
):
    """A micro-batch that was encoded and not trained on does not count as seen."""
    whole = flow_module(overlap_encoders=True)
    trainer().fit(whole, shard_data())
    save = ModelCheckpoint(tmp_path, filename="last", save_on_exception=True, every_n_train_steps=100)

    def dying(fail):
        build = trainer(callbacks=[fail, save], enable_checkpointing=True)
        build.fit(flow_module(overlap_encoders=True), shard_data())

    fails_after(dies_after, dying)
    (path,) = tmp_path.glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    steps = dies_after // 2
    assert (saved["hdm"]["samples"], saved["ShardDataModule"]["consumed"]) == (8 * steps, 8 * steps)
    resumed = flow_module(overlap_encoders=True)
    trainer(callbacks=[note_steps]).fit(resumed, shard_data(), ckpt_path=path)
    assert note_steps.samples(steps) == list(range(8 * steps, 48))
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_two_processes_take_the_steps_of_the_sequential_way(flow_module, shard_data, trainer, weights_of, on_processes):
    def fit(overlapped, **processes):
        module = flow_module(overlap_encoders=overlapped)
        trainer(**processes).fit(module, shard_data(2))
        return weights_of(module)

    sequential, overlapped = (
        on_processes(2, lambda overlapped=each, **processes: fit(overlapped, **processes)) for each in (False, True)
    )
    assert all(torch.equal(*pair) for pair in zip(sequential, overlapped, strict=True))


def test_training_batches_are_encoded_on_the_stream_and_all_of_them_is_handed_over(
    flow_module, shard_data, trainer, monkeypatch
):
    """Else the network could read what is not there yet, or what has been overwritten."""
    encoded, given, step = [], FrozenEncoders.latents_of_batch, FlowModule.training_step

    def latents_of_batch(self, batch):
        encoded.append((module.trainer.training, module.side_stream.is_open))
        return given(self, batch)

    def training_step(self, batch, batch_idx):
        taken = {id(each) for each in self.side_stream.taken}
        tensors = [value for value in batch.values() if torch.is_tensor(value)]
        conditioning = batch["encoded"].conditioning
        tensors += [batch["encoded"].latent, *(each for each in vars(conditioning).values() if torch.is_tensor(each))]
        assert {id(each) for each in tensors} == taken
        return step(self, batch, batch_idx)

    monkeypatch.setattr(flow_module_file, "SideStream", RecordedStream)
    monkeypatch.setattr(FrozenEncoders, "latents_of_batch", latents_of_batch)
    monkeypatch.setattr(FlowModule, "training_step", training_step)
    module = flow_module(overlap_encoders=True)
    trainer().fit(module, shard_data())
    assert set(encoded) == {(True, True), (False, False)}
    assert sum(training for training, _ in encoded) == 12
    assert module.side_stream is None
