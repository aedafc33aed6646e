"""`Trainer.fit(ckpt_path=…)` continues with the very next sample and ends with the weights of an unbroken fit."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

STEPS = 6


class NoteValidations(L.Callback):
    """Notes after how many steps a validation ended, and what Lightning's loggers are told as the step."""

    def __init__(self):
        self.steps, self.logged = [], []

    def on_validation_end(self, trainer, pl_module):
        """One more."""
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)
            self.logged.append(trainer.fit_loop.epoch_loop._batches_that_stepped)


def saves_on(event, folder):
    """A plain `ModelCheckpoint` that saves at every step, after every validation, or when the fit dies."""
    options = {
        "step": {"every_n_train_steps": 1},
        "validation": {"monitor": "val/loss"},
        "exception": {"save_on_exception": True, "every_n_train_steps": 100},
    }
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options[event])


def newest(folder):
    return max(folder.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])


@pytest.fixture
def whole(flow_module, shard_data, trainer, weights_of):
    """Weights, and steps at which it validated, of a fit that never stopped; keywords as of the trainer."""

    def fit(**changes):
        module, noted = flow_module(), NoteValidations()
        trainer(callbacks=[noted], **changes).fit(module, shard_data())
        return weights_of(module), noted

    return fit


@pytest.mark.parametrize("event", ["step", "exception"])
@pytest.mark.parametrize("dies_after", [3, 4, 5, 7, 8, 11])
def test_killed_and_resumed_equals_uninterrupted(
    flow_module, shard_data, trainer, note_steps, fails_after, weights_of, whole, tmp_path, event, dies_after
):
    """With validations after micro-batches 4, 8 and 12; a death in the midst of an accumulation counts to its step."""
    expected, validations = whole()
    build = partial(trainer, enable_checkpointing=True)
    first, second = NoteValidations(), NoteValidations()
    save = saves_on(event, tmp_path / "saved")

    def dying(fail):
        build(callbacks=[first, fail, save]).fit(flow_module(), shard_data())

    fails_after(dies_after, dying)
    path = newest(tmp_path / "saved")
    position = torch.load(path, weights_only=True)
    # Callbacks that save come after the one that fails, but for the exception.
    steps = dies_after // 2 if event == "exception" else (dies_after - 1) // 2
    assert position["hdm"]["step"] == steps and position["hdm"]["samples"] == 8 * steps
    assert position["ShardDataModule"]["consumed"] == 8 * steps

    module = flow_module()
    build(callbacks=[second, note_steps]).fit(module, shard_data(), ckpt_path=path)
    assert torch.equal(weights_of(module), expected)
    assert note_steps.samples(steps) == list(range(8 * steps, 8 * STEPS))
    # What is saved at the end of a batch does not know of the validation that follows, so that one is run again.
    due = [step for step in validations.steps if step >= steps]
    assert second.steps == [step for step in due if step > steps or event == "step" or step not in first.steps]
    assert second.logged == validations.logged[-len(second.steps) :]


def test_a_checkpoint_of_a_validation_does_not_repeat_it(
    flow_module, shard_data, trainer, fails_after, weights_of, whole, tmp_path
):
    expected, validations = whole()
    save = saves_on("validation", tmp_path)
    build = partial(trainer, enable_checkpointing=True)
    fails_after(5, lambda fail: build(callbacks=[save, fail]).fit(flow_module(), shard_data()))
    again, module = NoteValidations(), flow_module()
    build(callbacks=[again]).fit(module, shard_data(), ckpt_path=tmp_path / "step=2.ckpt")
    assert again.steps == validations.steps[1:] and again.logged == validations.logged[1:]
    assert torch.equal(weights_of(module), expected)


@pytest.mark.parametrize("dies_after", [3, 4, 5, 7])
def test_epochs_of_an_endless_stream_resume_too(
    flow_module, shard_data, trainer, note_steps, fails_after, weights_of, whole, tmp_path, dies_after
):
    """Three epochs of three micro-batches, whose second step has but one."""
    epochs = {"max_epochs": 3, "max_steps": -1, "limit_train_batches": 3, "check_val_every_n_epoch": 1}
    epochs |= {"val_check_interval": None}
    expected, _ = whole(**epochs)
    build = partial(trainer, enable_checkpointing=True, **epochs)
    save = saves_on("step", tmp_path)
    fails_after(dies_after, lambda fail: build(callbacks=[fail, save]).fit(flow_module(), shard_data()))
    path, module = newest(tmp_path), flow_module()
    begun = torch.load(path, weights_only=True)["hdm"]["samples"]
    fit = build(callbacks=[note_steps])
    fit.fit(module, shard_data(), ckpt_path=path)
    assert note_steps.samples() == list(range(begun, 36))
    assert fit.current_epoch == 3 and fit.global_step == 6
    assert torch.equal(weights_of(module), expected)


def test_each_remaining_sample_is_seen_once_with_other_micro_batches(
    flow_module, shard_data, trainer, note_steps, weights_of, whole, tmp_path
):
    """Steps of two times four samples, then of four times two and of one time eight, are the same steps."""
    expected, validations = whole()
    trainer(max_steps=2, enable_checkpointing=True, callbacks=[saves_on("validation", tmp_path / "a")]).fit(
        flow_module(), shard_data()
    )
    second, noted = flow_module(), NoteValidations()
    save = saves_on("validation", tmp_path / "b")
    trainer(
        max_steps=4, accumulate_grad_batches=4, val_check_interval=8, enable_checkpointing=True, callbacks=[save, noted]
    ).fit(second, shard_data(2), ckpt_path=newest(tmp_path / "a"))
    third = flow_module()
    trainer(accumulate_grad_batches=1, val_check_interval=2, callbacks=[noted, note_steps]).fit(
        third, shard_data(8), ckpt_path=newest(tmp_path / "b")
    )
    assert noted.steps == validations.steps[1:] and noted.logged == validations.logged[1:]
    assert note_steps.samples(4) == list(range(32, 48))
    torch.testing.assert_close(weights_of(third), expected, rtol=1e-4, atol=1e-5)  # sums in another order


def test_resumes_on_two_processes_and_on_one_again(
    flow_module, shard_data, trainer, note_steps, weights_of, whole, on_processes, tmp_path
):
    expected, _ = whole()
    trainer(max_steps=2, enable_checkpointing=True, callbacks=[saves_on("validation", tmp_path / "one")]).fit(
        flow_module(), shard_data()
    )

    def on_two(**processes):
        module, noted = flow_module(), NoteValidations()
        save = saves_on("validation", tmp_path / "two")
        fit = trainer(max_steps=4, enable_checkpointing=True, callbacks=[noted, save, note_steps], **processes)
        fit.fit(module, shard_data(2), ckpt_path=newest(tmp_path / "one"))
        return note_steps.steps[2:], noted.steps, weights_of(module), float(fit.callback_metrics["val/loss"])

    (ours, steps, weights, loss), (others, _, same, same_loss) = on_processes(2, on_two)
    assert [sorted(a + b) for a, b in zip(ours, others, strict=True)] == [[*range(16, 24)], [*range(24, 32)]]
    assert torch.equal(weights, same) and loss == same_loss
    assert steps == [4]
    third, noted = flow_module(), NoteValidations()
    fit = trainer(callbacks=[noted, note_steps])
    fit.fit(third, shard_data(), ckpt_path=newest(tmp_path / "two"))
    assert noted.steps == [6] and note_steps.samples(4) == list(range(32, 48))
    torch.testing.assert_close(weights_of(third), expected, rtol=1e-4, atol=1e-5)  # sums in another order

    (measured,) = trainer().validate(third, shard_data())

    def measure_on_two(**processes):
        return trainer(**processes).validate(third, shard_data(validation_batch_size=3))[0]["val/loss"]

    assert on_processes(2, measure_on_two) == [pytest.approx(measured["val/loss"], rel=1e-6)] * 2


def test_settings_of_now_count_and_moments_of_the_checkpoint(flow_module, shard_data, trainer, tmp_path):
    """Another rate and decay, with the same schedule: its factor is that of the step."""
    save = saves_on("step", tmp_path)
    trainer(max_steps=3, enable_checkpointing=True, callbacks=[save]).fit(flow_module(), shard_data())
    path = newest(tmp_path)
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]
    module, fit = flow_module(learning_rate=0.5, weight_decay=0.03), trainer(max_steps=3)
    module.on_train_start = lambda: None
    fit.fit(module, shard_data(), ckpt_path=path)  # restores, and finds that it is done
    (optimizer,) = fit.optimizers
    factor = fit.lr_scheduler_configs[0].scheduler.lr_lambdas[0](3)
    for group, own in zip(optimizer.param_groups, module.parameter_groups(), strict=True):
        assert group["lr"] == pytest.approx(own["lr"] * factor) and group["weight_decay"] == own["weight_decay"]
    first = optimizer.param_groups[0]["params"][0]
    assert torch.equal(optimizer.state[first]["exp_avg"], saved["state"][0]["exp_avg"])


def test_a_fit_that_begins_anew_counts_from_zero(flow_module, shard_data, trainer, note_steps):
    module, data = flow_module(), shard_data()
    trainer(max_steps=2).fit(module, data)
    trainer(max_steps=2, callbacks=[note_steps]).fit(module, shard_data())
    assert module.samples_trained == 16
    assert note_steps.samples() == list(range(16))
