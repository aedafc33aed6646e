"""Checkpoints of a training: which are written when and which stay, whole whatever happens."""

import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch

from damage import flip_a_bit
from hdm_lightning.errors import UserError
from hdm_lightning.training.callbacks import steps
from hdm_lightning.training.callbacks.stage_checkpoint import StageCheckpoint
from hdm_lightning.training.checkpoint_io import AtomicCheckpointIO, checkpoints_in, read_checkpoint
from hdm_lightning.training.rewind import start_point


def steps_in(folder):
    return [int(path.stem.removeprefix("step-")) for path in checkpoints_in(Path(folder))]


@pytest.fixture
def saving(trainer, flow_module, shard_data, tmp_path):
    """Function that fits with a `StageCheckpoint`; gives the callback and the module."""

    def fit(callback=None, *, ckpt_path=None, callbacks=(), weights_only=None, **changes):
        save, module = callback or StageCheckpoint(tmp_path / "saved"), flow_module()
        run = trainer(
            callbacks=[*callbacks, save], enable_checkpointing=True, plugins=[AtomicCheckpointIO()], **changes
        )
        run.fit(module, shard_data(), ckpt_path=ckpt_path, weights_only=weights_only)
        return save, module

    return fit


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"every_n_steps": 2, "keep": 9}, [2, 4, 6]),
        ({"every_n_samples": 17, "keep": 9}, [3, 6]),
        ({"every_n_steps": 1, "keep": 2}, [5, 6]),
        ({"keep": 9}, [6]),
        ({"every_minutes": 1e-9, "keep": 9}, [1, 2, 3, 4, 5, 6]),
        ({"every_minutes": 0.0, "keep": 9}, [6]),
    ],
)
def test_steps_samples_and_minutes(saving, tmp_path, settings, steps):
    saving(StageCheckpoint(tmp_path, **settings))
    assert steps_in(tmp_path) == steps


def test_minutes_by_a_clock_that_is_asked_now_and_then(saving, tmp_path, monkeypatch):
    """A step takes 7 s: with one minute between two, asked every tenth of it, that is every ninth step."""
    now = [0.0]

    class Later(L.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 7.0

    monkeypatch.setattr(steps.time, "monotonic", lambda: now[0])
    save = StageCheckpoint(tmp_path, every_minutes=1.0, keep=9)
    saving(save, callbacks=[Later()], max_steps=20, accumulate_grad_batches=1, limit_val_batches=0)
    assert steps_in(tmp_path) == [9, 18, 20]


def test_the_first_process_s_clock_counts(flow_module, shard_data, trainer, on_processes, tmp_path):
    def fit(**processes):
        save = StageCheckpoint(tmp_path, every_minutes=1e-9, keep=9)
        run = trainer(callbacks=[save], max_steps=2, enable_checkpointing=True, **processes)
        if run.global_rank:
            save._clock.seconds = 1e9  # never by its own clock
        run.fit(flow_module(), shard_data(2))

    on_processes(2, fit)
    assert steps_in(tmp_path) == [1, 2]


def test_it_comes_after_the_validation_of_its_step_and_keeps_its_numbers(saving, tmp_path):
    """Validations after steps 2, 4 and 6."""
    save, _ = saving(StageCheckpoint(tmp_path, every_n_steps=1, keep=9))
    validated = [read_checkpoint(path)["hdm"]["validated"] for path in checkpoints_in(tmp_path)]
    assert validated == [False, True, False, True, False, True]
    last = read_checkpoint(tmp_path / "step-00000006.ckpt")
    assert last["callbacks"]["StageCheckpoint"]["metrics"] == save.metrics and set(save.metrics) == {"val/loss"}


def test_a_validation_that_has_no_batch_keeps_no_checkpoint_back(trainer, flow_module, shard_data, tmp_path):
    save = StageCheckpoint(tmp_path, every_n_steps=2, keep=9)
    trainer(callbacks=[save], enable_checkpointing=True).fit(flow_module(), shard_data(validation_samples=0))
    assert steps_in(tmp_path) == [2, 4, 6]


def test_last_is_the_newest_whole_one_and_resuming_equals_never_stopping(saving, fails_after, weights_of, tmp_path):
    _, whole = saving(StageCheckpoint(tmp_path / "whole"))
    folder = tmp_path / "saved"
    fails_after(9, lambda fail: saving(StageCheckpoint(folder, every_n_steps=1), callbacks=[fail]))
    assert steps_in(folder) == [3, 4]
    newest = folder / "step-00000004.ckpt"
    flip_a_bit(newest)
    with pytest.raises(UserError, match="damaged"):
        saving(ckpt_path=newest)
    _, resumed = saving(StageCheckpoint(folder), ckpt_path="last")
    assert torch.equal(weights_of(resumed), weights_of(whole))


DAMAGE = {
    "flipped": flip_a_bit,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_ones_are_set_aside(saving, tmp_path, damage):
    saving(StageCheckpoint(tmp_path, every_n_steps=2, keep=9))
    for step in (4, 6):
        path = tmp_path / f"step-{step:08d}.ckpt"
        DAMAGE[damage](path)
    assert start_point(tmp_path, []).checkpoint == tmp_path / "step-00000002.ckpt"
    assert steps_in(tmp_path) == [2]
    assert {path.name for path in tmp_path.glob("*.damaged")} == {f"step-0000000{step}.ckpt.damaged" for step in (4, 6)}


@pytest.mark.parametrize(
    ("where", "expected"), [("half written", 0.0), ("fsync", 0.0), ("replace", 0.0), ("never", 1.0)]
)
def test_a_kill_while_saving_leaves_the_file_that_was_there(tmp_path, where, expected):
    """Under its name is the old checkpoint or the new one, whole, and nothing else."""
    path, plugin = tmp_path / "last.ckpt", AtomicCheckpointIO()
    plugin.save_checkpoint({"weights": torch.zeros(50_000)}, path)
    pid = os.fork()
    if pid == 0:
        if where == "half written":
            torch.save = lambda checkpoint, file: (file.write(b"PK" * 1000), file.flush(), die())
        elif where != "never":
            setattr(os, where, die)
        plugin.save_checkpoint({"weights": torch.ones(50_000)}, path)
        os._exit(0)
    os.waitpid(pid, 0)
    assert float(plugin.load_checkpoint(path)["weights"].mean()) == expected


def die(*_, **__):
    """As the out-of-memory killer does it."""
    os.kill(os.getpid(), signal.SIGKILL)
