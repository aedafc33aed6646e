"""Averages of the weights in a plain Trainer, against numpy and against a network that really has them."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from hdm_lightning.training.averaging.power_function import gamma_of, read_snapshots
from hdm_lightning.training.callbacks.weight_averages import OLD_KEY, StoreAverages, WeightAverages, averages_state

AVERAGES = {"halflife_samples": [16, 64], "ramp": 0.05, "sigma_rel": [0.1]}


class NoteWeights(L.Callback):
    """Keeps the weights after every step, and those before the first."""

    def __init__(self):
        self.weights = []

    def on_train_start(self, trainer, pl_module):
        """Before the first step."""
        self.weights = [flat(pl_module.network)]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """After a step."""
        if trainer.global_step == len(self.weights):
            self.weights.append(flat(pl_module.network))


def flat(network):
    return torch.cat([value.detach().flatten() for value in network.parameters()]).double().numpy()


def recomputed(weights, samples):
    """The three averages by their recursions, written out."""
    found = [weights[0]] * 3
    for step, now in enumerate(weights[1:], start=1):
        seen = samples * step
        keep = [0.5 ** (samples / min(halflife, 0.05 * seen)) for halflife in (16, 64)]
        keep.append(max(0.0, 1 - samples / seen) ** (gamma_of(0.1) + 1))
        found = [k * old + (1 - k) * now for k, old in zip(keep, found, strict=True)]
    return found


def test_averages_are_those_of_a_plain_recomputation(flow_module, shard_data, trainer):
    averages, noted = WeightAverages(**AVERAGES), NoteWeights()
    trainer(callbacks=[averages, noted]).fit(flow_module(), shard_data())
    for shadow, expected in zip(averages.state.shadows, recomputed(noted.weights, 8), strict=True):
        got = torch.cat([value.flatten() for value in shadow]).double().numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_every_average_is_validated_beside_the_weights(flow_module, shard_data, trainer):
    averages, module, fit = WeightAverages(**AVERAGES), flow_module(), trainer
    first = fit(callbacks=[averages])
    first.fit(module, shard_data())
    for which, name in enumerate(averages.state.names()):
        other = flow_module(copy.deepcopy(module.network))
        other.network.load_state_dict(averages.state.weights(which))
        (measured,) = fit().validate(other, shard_data())
        assert float(first.callback_metrics[f"val/loss_{name}"]) == pytest.approx(measured["val/loss"], rel=1e-5)
    (again,) = fit(callbacks=[averages]).validate(module, shard_data())
    assert again["val/loss_ema_16"] == pytest.approx(float(first.callback_metrics["val/loss_ema_16"]), rel=1e-6)


def test_averages_of_several_processes_are_validated_on_all_samples(flow_module, shard_data, trainer, on_processes):
    def fit(**processes):
        averages, module = WeightAverages(**AVERAGES), flow_module()
        run = trainer(callbacks=[averages], **processes)
        run.fit(module, shard_data(4 // run.world_size, validation_batch_size=3))
        return {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}

    one, (two, same) = fit(), on_processes(2, fit)
    assert two == same and set(two) == {"val/loss", "val/loss_ema_16", "val/loss_ema_64", "val/loss_power_0.100"}
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("key", ["WeightAverages", OLD_KEY])
def test_averages_resume_from_a_checkpoint_also_of_an_older_version(
    flow_module, shard_data, trainer, fails_after, tmp_path, key
):
    whole = WeightAverages(**AVERAGES)
    trainer(callbacks=[whole]).fit(flow_module(), shard_data())
    save = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="three")
    settings = {"enable_checkpointing": True}

    def dying(fail):
        trainer(callbacks=[WeightAverages(**AVERAGES), save, fail], **settings).fit(flow_module(), shard_data())

    fails_after(8, dying)
    path = tmp_path / "three.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["callbacks"][key] = saved["callbacks"].pop("WeightAverages")
    torch.save(saved, path)
    assert averages_state(saved)["samples_seen"] == 24
    resumed = WeightAverages(**AVERAGES)
    trainer(callbacks=[resumed]).fit(flow_module(), shard_data(), ckpt_path=path)
    for got, expected in zip(resumed.state.shadows, whole.state.shadows, strict=True):
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


class Plain(L.LightningModule):
    """A module of somebody else: one weight that falls by 1 a step, and is logged in a validation."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.network.weight, 0.0)

    def training_step(self, batch, batch_idx):
        """Gradient 1."""
        return self.network.weight.sum()

    def validation_step(self, batch, batch_idx):
        """The weight itself."""
        self.log("val/weight", self.network.weight.item())

    def configure_optimizers(self):
        """Rate 1."""
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("dies", [False, True])
def test_another_module_is_validated_with_the_average_in_place_of_its_weights(trainer, monkeypatch, dies):
    """A half-life of one step, counted in steps: after weights −1 and −2 the average of 0 is −1.25."""
    module = Plain()
    if dies:
        monkeypatch.setattr(Plain, "on_validation_epoch_end", lambda self: 1 / 0)
    batches = torch.utils.data.DataLoader(torch.zeros(8))
    fit = trainer(
        max_steps=2,
        accumulate_grad_batches=1,
        gradient_clip_val=None,
        val_check_interval=2,
        callbacks=[WeightAverages([1], ramp=0.0)],
        num_sanity_val_steps=0,
    )
    if dies:
        with pytest.raises(ZeroDivisionError):
            fit.fit(module, batches, batches)
    else:
        fit.fit(module, batches, batches)
        assert fit.callback_metrics["val/weight"] == pytest.approx(-1.25)
    assert module.network.weight.item() == -2.0


def test_power_averages_are_stored_as_they_are_at_their_time(flow_module, shard_data, trainer, tmp_path):
    averages, noted = WeightAverages(**AVERAGES), NoteWeights()
    store = StoreAverages(tmp_path / "snapshots", every_n_steps=4, dtype="float32")
    trainer(callbacks=[averages, noted, store]).fit(flow_module(), shard_data())
    assert [snapshot.samples for snapshot in read_snapshots(tmp_path / "snapshots")] == [32, 48]
    tensors = load_file(read_snapshots(tmp_path / "snapshots")[0].path)
    names = [name for name, _ in averages.state.network.named_parameters()]
    got = torch.cat([tensors[name].flatten() for name in names]).double().numpy()
    np.testing.assert_allclose(got, recomputed(noted.weights[:5], 8)[2], rtol=1e-5, atol=1e-7)
