"""Time and money of trainings in a plain Trainer, by a clock that the tests turn."""

import time

import lightning as L
import pytest

from hdm_lightning.errors import UserError
from hdm_lightning.training.callbacks.ends import Budget, PlateauStopping, ValidateAtEnds
from hdm_lightning.training.callbacks.keep_ledger import KeepLedger, Ledger
from hdm_lightning.training.callbacks.loss_guard import Finding, LossRewind
from hdm_lightning.training.callbacks.stage_checkpoint import StageCheckpoint


class Turn(L.Callback):
    """Moves the clock by so many seconds a micro-batch."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds = [0.0], seconds
        monkeypatch.setattr(time, "monotonic", lambda: self.now[0])

    def on_train_batch_start(self, *_):
        """Later."""
        self.now[0] += self.seconds


class Die(L.Callback):
    """Raises at the end of a step."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, *_):
        """At that step."""
        if trainer.global_step == self.step:
            raise self.error


def test_the_ledger_adds_up_over_starts_and_kinds_of_ends(flow_module, shard_data, trainer, tmp_path, monkeypatch):
    """Steps of 200 s: dead after two, resumed after one that was saved, to the end; then another stage of 400 s."""
    path = tmp_path / "ledger.jsonl"

    def fit(*callbacks, price=3.6, seconds=100.0, stage="px16", ckpt=None, **changes):
        ledger = KeepLedger(path, usd_per_device_hour=price)
        run = trainer(callbacks=[Turn(monkeypatch, seconds), *callbacks, ledger], limit_val_batches=0, **changes)
        run.fit(flow_module(stage=stage), shard_data(stage=stage), ckpt_path=ckpt)
        return ledger

    save = StageCheckpoint(tmp_path, every_n_steps=1, every_minutes=0)
    hit = LossRewind(Finding(2, "it spiked"), [], [])
    with pytest.raises(LossRewind):
        fit(save, Die(2, hit), enable_checkpointing=True)
    ledger = fit(ckpt=tmp_path / "step-00000001.ckpt", max_steps=3)
    assert ledger.spent("seconds", stage=True) == 800.0
    assert ledger.spent("cost_usd", stage=True) == pytest.approx(0.8) and ledger.spent("device_hours") == pytest.approx(
        800 / 3600, abs=1e-5
    )
    fit(max_steps=1, price=36.0, seconds=200.0, stage="px24")

    book = Ledger(path)
    told = [(event["event"], event["stage"], event["samples"], event.get("seconds")) for event in book.events()]
    assert told == [
        ("start", "px16", 0, None),
        ("progress", "px16", 8, 200.0),
        ("rewind", "px16", 16, 200.0),
        ("start", "px16", 8, None),
        ("progress", "px16", 24, 400.0),  # after more than five minutes without a line
        ("end", "px16", 24, 0.0),
        ("start", "px24", 0, None),
        ("progress", "px24", 8, 400.0),
        ("end", "px24", 8, 0.0),
    ]
    assert book.starts("px16") == 2 and book.events()[3]["restarts"] == 1
    assert "it spiked" in book.events()[2]["reason"]
    assert book.spent("cost_usd", "px16") == pytest.approx(0.8) and book.spent("cost_usd") == pytest.approx(4.8)
    assert all(event["peak_memory_gb"] > 0.05 for event in book.events() if event["event"] == "end")


@pytest.mark.parametrize(
    ("settings", "booked", "step"),
    [
        ({"max_hours": 0.5}, False, 3),
        ({"max_hours": 0.5}, True, 3),
        ({"max_cost_usd": 2.0, "usd_per_device_hour": 6.0}, False, 2),
        ({"max_cost_usd": 2.0}, True, 4),  # the ledger's price is half
        ({"max_hours": 100.0}, True, 6),
    ],
)
def test_a_budget_ends_the_fit_after_a_last_validation(
    flow_module, shard_data, trainer, tmp_path, monkeypatch, settings, booked, step
):
    """A step takes ten minutes; without the budget no validation would be due."""
    callbacks = [KeepLedger(tmp_path / "ledger.jsonl", usd_per_device_hour=3.0)] if booked else []
    budget = Budget(**settings)
    run = trainer(callbacks=[budget, Turn(monkeypatch, 300.0), *callbacks], val_check_interval=100)
    run.fit(flow_module(), shard_data())
    assert run.global_step == step
    assert (budget.reason is None) == (step == 6)
    assert ("val/loss" in run.callback_metrics) == (step < 6)


def test_a_spent_budget_counts_restarts_and_stays_spent(flow_module, shard_data, trainer, tmp_path, monkeypatch):
    def fit(ckpt=None, **changes):
        run = trainer(callbacks=[Budget(max_hours=0.5), Turn(monkeypatch, 300.0)], **changes)
        run.fit(flow_module(), shard_data(), ckpt_path=ckpt)
        return run

    first = fit(max_steps=2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    second = fit(tmp_path / "two.ckpt")
    assert second.global_step == 3
    second.save_checkpoint(tmp_path / "three.ckpt")
    assert fit(tmp_path / "three.ckpt").global_step == 3


@pytest.mark.parametrize("settings", [{"max_hours": 0.0}, {"max_cost_usd": -1.0}])
def test_a_budget_of_nothing_is_refused(settings):
    with pytest.raises(UserError, match="not positive") as caught:
        Budget(**settings)
    assert caught.value.where == f"callbacks.budget.{next(iter(settings))}"


@pytest.mark.parametrize("settings", [{"samples": 0}, {"samples": 8, "min_delta": -0.1}])
def test_a_plateau_that_cannot_be_is_refused_by_its_key(settings):
    with pytest.raises(UserError) as caught:
        PlateauStopping(**settings)
    assert caught.value.where == f"callbacks.plateau.{list(settings)[-1]}"


def test_a_plateau_is_measured_in_samples_and_the_lowest_loss_counts(flow_module, shard_data, trainer, monkeypatch):
    """Losses before the first step and after steps 2, 4, 6 …: the last improvement is that of an average at step 4."""
    losses = iter([(5.0, 5.0), (4.0, 6.0), (4.5, 3.0), (4.0, 3.0), (3.5, 2.95), (9.0, 9.0), (9.0, 9.0)])

    class Fake(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            raw, averaged = next(losses)
            pl_module.log("val/loss", raw)
            pl_module.log("val/loss_ema", averaged)

    module = flow_module()
    monkeypatch.setattr(type(module), "validation_step", lambda self, batch, batch_idx: None)
    stop = PlateauStopping(32, min_delta=0.1)
    run = trainer(callbacks=[Fake(), stop], max_steps=50, num_sanity_val_steps=-1)
    run.fit(module, shard_data())
    assert run.global_step == 8 and stop.best == 3.0 and stop.best_samples == 32
    assert stop.reason == "no improvement over 32 samples"


def test_the_ends_of_a_fit_are_validated_and_logged(flow_module, shard_data, trainer, tmp_path):
    """With an interval that never comes round."""
    logged = []

    class Note(L.pytorch.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.extend((name, value, step) for name, value in metrics.items() if name == "val/loss")

    ends, module = ValidateAtEnds(), flow_module()
    (before,) = trainer().validate(module, shard_data())
    run = trainer(callbacks=[ends], num_sanity_val_steps=-1, val_check_interval=1000, logger=Note(tmp_path))
    run.fit(module, shard_data())
    assert ends.first == pytest.approx(before, rel=1e-6)
    assert [(name, step) for name, _, step in logged] == [("val/loss", 0), ("val/loss", 5)]
    (after,) = trainer().validate(module, shard_data())
    assert [value for _, value, _ in logged] == pytest.approx([before["val/loss"], after["val/loss"]], rel=1e-6)
