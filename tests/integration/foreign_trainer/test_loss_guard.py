"""The guard in a plain Trainer: planted losses and weights, on one process and two."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hdm_lightning.training.callbacks.loss_guard import OLD_KEY, LossGuard, LossRewind, guard_streak


class Plant(L.Callback):
    """Multiplies the loss of the sample at a position, before any other callback sees it."""

    def __init__(self, *positions, factor=float("nan")):
        self.positions, self.factor = positions, factor

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Where the sample is on this process."""
        for row, position in enumerate(batch["index"].tolist()):
            if position in self.positions:
                outputs["sample_losses"][row] *= self.factor


class BreakWeights(L.Callback):
    """Makes a gradient infinite at a step, so that the loss is finite and the weights are not."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """In the gradient of the first parameter."""
        if trainer.global_step == self.step - 1:
            next(pl_module.network.parameters()).grad.fill_(torch.inf)


def key_of(data, position):
    batches = iter(data.train_dataloader())
    found = {}
    while position not in found:
        batch = next(batches)
        found |= dict(zip(batch["index"].tolist(), batch["keys"], strict=True))
    return found[position]


def test_a_loss_that_is_no_number_names_step_and_sample_and_is_not_saved(flow_module, shard_data, trainer, tmp_path):
    """Position 21 belongs to the third step of eight samples."""
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    fit = trainer(callbacks=[Plant(21), LossGuard(), save], enable_checkpointing=True)
    with pytest.raises(LossRewind, match="step 3 is not finite") as hit:
        fit.fit(flow_module(), shard_data())
    assert hit.value.finding.step == 3
    assert hit.value.suspects == [key_of(shard_data(), 21)]
    assert [position for position, _ in hit.value.samples] == list(range(16, 24))  # since the checkpoint of step 2
    assert dict(hit.value.samples)[21] == key_of(shard_data(), 21)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=2.ckpt"]


def test_both_processes_leave_for_a_loss_of_one(flow_module, shard_data, trainer, on_processes):
    def fit(**processes):
        guard = LossGuard()
        with pytest.raises(LossRewind) as hit:
            trainer(callbacks=[Plant(21), guard], **processes).fit(flow_module(), shard_data(2))
        return hit.value.finding.step, hit.value.suspects, [position for position, _ in hit.value.samples]

    expected = (3, [key_of(shard_data(), 21)], list(range(24)))
    assert on_processes(2, fit) == [expected] * 2


@pytest.mark.parametrize("spikes", [1, 2])
def test_losses_that_stay_high_are_a_spike_and_a_single_one_is_none(flow_module, shard_data, trainer, spikes):
    """Steps 3 and 4 lose a thousand times too much."""
    plant = Plant(*range(16, 16 + 8 * spikes), factor=1000.0)
    fit = trainer(callbacks=[plant, LossGuard(spike_factor=3.0, patience=2, warmup_steps=2)])
    if spikes == 1:
        fit.fit(flow_module(), shard_data())
        return
    with pytest.raises(LossRewind) as hit:
        fit.fit(flow_module(), shard_data())
    assert hit.value.finding.step == 4


def test_broken_weights_are_found_before_they_are_measured_or_saved(flow_module, shard_data, trainer, tmp_path):
    measured = []

    class Measured(L.Callback):
        def on_validation_batch_start(self, trainer, *_):
            measured.append(trainer.global_step)

    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    callbacks = [BreakWeights(4), LossGuard(look_every=100), Measured(), save]
    fit = trainer(callbacks=callbacks, enable_checkpointing=True, gradient_clip_val=None, num_sanity_val_steps=0)
    with pytest.raises(LossRewind, match="weights are not finite after step 4"):
        fit.fit(flow_module(), shard_data())
    assert set(measured) == {2}
    assert not (tmp_path / "step=4.ckpt").exists()


def test_a_module_without_losses_by_sample_is_watched_too(trainer):
    class Diverging(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else self.weight * (torch.nan if batch_idx == 4 else 1.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    fit = trainer(callbacks=[LossGuard()], accumulate_grad_batches=1, gradient_clip_val=None, val_check_interval=None)
    with pytest.raises(LossRewind) as hit:
        fit.fit(Diverging(), torch.utils.data.DataLoader(torch.zeros(8)))
    assert hit.value.finding.step == 5 and hit.value.suspects == []


@pytest.mark.parametrize("key", ["LossGuard", OLD_KEY])
def test_the_running_mean_is_in_the_checkpoint(flow_module, shard_data, trainer, tmp_path, key):
    guard, fit = LossGuard(), None
    fit = trainer(callbacks=[guard], max_steps=3)
    fit.fit(flow_module(), shard_data())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["LossGuard"]["steps"] == 3 and guard_streak(saved) == 0
    saved["callbacks"][key] = saved["callbacks"].pop("LossGuard") | {"streak": 2}
    torch.save(saved, tmp_path / "last.ckpt")
    assert guard_streak(saved) == 2
    other = LossGuard()
    trainer(callbacks=[other], max_steps=3).fit(flow_module(), shard_data(), ckpt_path=tmp_path / "last.ckpt")
    assert other.detector.mean == guard.detector.mean and other.detector.streak == 2
