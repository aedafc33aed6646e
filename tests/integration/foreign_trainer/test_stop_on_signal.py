"""Signals to a training in a plain Trainer, by `os.kill`, in one process and two."""

import os
import signal
import subprocess
import sys
import time

import lightning as L
import pytest
import torch

from hdm_lightning.training.callbacks import steps
from hdm_lightning.training.callbacks.ends import Budget
from hdm_lightning.training.callbacks.stage_checkpoint import StageCheckpoint
from hdm_lightning.training.callbacks.stop_on_signal import StopOnSignal, StoppedBySignal
from hdm_lightning.training.checkpoint_io import checkpoints_in, read_checkpoint


class Send(L.Callback):
    """Sends its own process a signal in the midst of a step."""

    def __init__(self, number, batch, hook="on_train_batch_start"):
        self.number, self.batch = number, batch
        setattr(self, hook, self.send)

    def send(self, trainer, pl_module, *args):
        """At that batch of the fit."""
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_the_step_is_finished_and_saved_and_the_training_resumes(
    flow_module, shard_data, trainer, weights_of, tmp_path, capfd, number, status
):
    whole = flow_module()
    trainer().fit(whole, shard_data())
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    callbacks = [Send(number, 7), StopOnSignal(), StageCheckpoint(tmp_path)]
    with pytest.raises(StoppedBySignal, match="from step 4") as stop:
        trainer(callbacks=callbacks, enable_checkpointing=True).fit(flow_module(), shard_data())
    assert stop.value.code == status and stop.value.checkpoint == checkpoints_in(tmp_path)[-1]
    assert ("Ctrl-C again ends at once" in capfd.readouterr().err) == (number == signal.SIGINT)
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert read_checkpoint(stop.value.checkpoint)["hdm"]["step"] == 4
    resumed = flow_module()
    trainer().fit(resumed, shard_data(), ckpt_path=stop.value.checkpoint)
    assert torch.equal(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_both(flow_module, shard_data, trainer, on_processes, tmp_path, rank):
    def fit(**processes):
        run = trainer(
            callbacks=[StopOnSignal(), StageCheckpoint(tmp_path)], enable_checkpointing=True, max_steps=50, **processes
        )
        if run.global_rank == rank:
            run.callbacks.insert(0, Send(signal.SIGTERM, 3))
        with pytest.raises(StoppedBySignal):
            run.fit(flow_module(), shard_data(2))
        return run.global_step

    assert on_processes(2, fit) == [2, 2]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000002.ckpt"]


def test_processes_do_not_wait_for_each_other_s_signals_before_a_batch(
    flow_module, shard_data, trainer, on_processes, monkeypatch
):
    """Lightning has the first process tell the others at every batch, for which the host would wait for the device."""

    def fit(**processes):
        told = []
        monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, *_args, **_kwargs: told.append(tensor))
        run = trainer(callbacks=[StopOnSignal()], limit_val_batches=0, **processes)
        run.fit(flow_module(), shard_data(2))
        return run.global_step, len(told)

    assert on_processes(2, fit) == [(6, 0), (6, 0)]


def test_a_signal_in_a_validation_stops_at_its_end(flow_module, shard_data, trainer, tmp_path):
    callbacks = [Send(signal.SIGTERM, 4, "on_validation_batch_start"), StopOnSignal(), StageCheckpoint(tmp_path)]
    run = trainer(callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=0)
    with pytest.raises(StoppedBySignal):
        run.fit(flow_module(), shard_data())
    (path,) = checkpoints_in(tmp_path)
    assert read_checkpoint(path)["hdm"] | {"step": 2, "validated": True} == read_checkpoint(path)["hdm"]


def test_a_plain_checkpoint_callback_saves_as_well(flow_module, shard_data, trainer, tmp_path):
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=100)
    run = trainer(callbacks=[Send(signal.SIGTERM, 3), StopOnSignal(), save], enable_checkpointing=True)
    with pytest.raises(StoppedBySignal) as stop:
        run.fit(flow_module(), shard_data())
    assert read_checkpoint(stop.value.checkpoint)["hdm"]["samples"] == 16


def test_a_signal_before_the_first_step_stops_there(flow_module, shard_data, trainer):
    run = trainer(callbacks=[Send(signal.SIGTERM, 0, "on_sanity_check_start"), StopOnSignal()])
    with pytest.raises(StoppedBySignal, match="before the first step"):
        run.fit(flow_module(), shard_data())
    assert run.global_step == 0


def test_a_second_ctrl_c_ends_the_process_at_once():
    code = (
        "import os, signal; from hdm_lightning.training.stop_request import StopRequest\n"
        "with StopRequest().listening():\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT); os._exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 130


def test_where_an_exchange_is_costly_processes_ask_each_other_once_a_second(
    flow_module, shard_data, trainer, on_processes, tmp_path, monkeypatch
):
    """Steps of 0.2 s by a clock that the test turns, of which process 1's runs twice as fast."""

    def fit(**processes):
        stop, budget = StopOnSignal(every_s=1.0), Budget(max_hours=10.0, every_s=1.0)
        run = trainer(
            callbacks=[budget, stop, StageCheckpoint(tmp_path, every_minutes=0)],
            enable_checkpointing=True,
            max_steps=60,
            val_check_interval=10_000,
            **processes,
        )
        now, asked = [0.0], []
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        exchange = steps.Pace.exchange

        def noted(self, flag, step, device):
            asked.append(step)
            return exchange(self, flag, step, device)

        class Turn(L.Callback):
            def on_train_batch_start(self, *_):
                now[0] += 0.1 * (1 + run.global_rank)

        monkeypatch.setattr(steps.Pace, "exchange", noted)
        run.callbacks[:0] = [Turn(), *([Send(signal.SIGTERM, 60)] if run.global_rank == 1 else [])]
        with pytest.raises(StoppedBySignal):
            run.fit(flow_module(), shard_data(2))
        return run.global_step, asked

    (first, asked), (second, asked_too) = on_processes(2, fit)
    assert first == second and asked == asked_too
    assert 30 <= first <= 36  # micro-batch 60 is of step 30
    assert len(asked) <= 2 * (first // 4)  # of both callbacks; after every step they would be twice as many as steps


def test_the_last_step_hears_a_signal_whatever_the_pace(flow_module, shard_data, trainer, tmp_path):
    callbacks = [Send(signal.SIGTERM, 11), StopOnSignal(every_s=1e6), StageCheckpoint(tmp_path)]
    with pytest.raises(StoppedBySignal, match="from step 6"):
        trainer(callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0).fit(flow_module(), shard_data())
