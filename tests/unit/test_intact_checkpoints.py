"""Every kind of damage to a checkpoint is found before anything is trained on it."""

import os
import random

import pytest
import torch

from hdm_lightning.errors import UserError
from hdm_lightning.training.checkpoint_io import AtomicCheckpointIO, DamagedCheckpoint, read_intact
from hdm_lightning.training.rewind import newest_position, start_point


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def content(step):
    random_ = torch.Generator().manual_seed(step)
    weights = {f"network.{name}": torch.randn(40, 30, generator=random_) for name in "abcde"}
    return {"hdm": {"step": step, "batch_size": 8}, "state_dict": weights, "callbacks": {}, "optimizer_states": []}


@pytest.fixture
def saved(tmp_path):
    """Folder with the checkpoints of steps 2, 4 and 6."""
    for step in (2, 4, 6):
        AtomicCheckpointIO().save_checkpoint(content(step), tmp_path / f"step-{step:08d}.ckpt")
    return tmp_path


def path_of(folder, step):
    return folder / f"step-{step:08d}.ckpt"


def test_a_whole_one_is_read_as_it_was_written(saved):
    read = read_intact(path_of(saved, 6))
    assert read["hdm"] == content(6)["hdm"]
    assert all(torch.equal(read["state_dict"][name], value) for name, value in content(6)["state_dict"].items())
    assert start_point(saved, []).checkpoint == path_of(saved, 6)


def test_no_flipped_bit_changes_what_is_read(saved):
    path, lot = path_of(saved, 6), random.Random(0)
    whole, expected = path.read_bytes(), content(6)
    found = 0
    for _ in range(300):
        broken = bytearray(whole)
        broken[lot.randrange(len(whole))] ^= 1 << lot.randrange(8)
        path.write_bytes(broken)
        try:
            read = read_intact(path)
        except DamagedCheckpoint:
            found += 1
        else:  # in the padding between records
            assert read["hdm"] == expected["hdm"]
            assert all(torch.equal(read["state_dict"][name], value) for name, value in expected["state_dict"].items())
    assert found > 200


def replaced(value):
    return lambda path: torch.save(value, path)


def other_step(path):
    path.write_bytes(path.with_name("step-00000004.ckpt").read_bytes())


def folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "empty": (lambda path: path.write_bytes(b""), "cut off"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:900]), "cut off"),
    "random": (lambda path: path.write_bytes(random.Random(1).randbytes(20_000)), "not a checkpoint"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "not a checkpoint"),
    "folder": (folder, "Is a directory"),
    "other step": (other_step, "from step 4"),
    "fields missing": (replaced({"hdm": {"step": 6}}), "state_dict"),
    "no mapping": (replaced(torch.zeros(3)), ""),
    "code": (replaced({**content(6), "evil": Evil()}), "more than plain data"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_one_is_set_aside_with_its_reason_and_the_next_older_taken(saved, kind, capsys):
    damage, reason = DAMAGES[kind]
    damage(path_of(saved, 6))
    assert newest_position(saved)["step"] == 4
    start = start_point(saved, [])
    assert (start.checkpoint, start.step) == (path_of(saved, 4), 4)
    told = capsys.readouterr().out
    assert str(path_of(saved, 6)) in told and reason in told
    assert sorted(path.name for path in saved.iterdir())[-1] == "step-00000006.ckpt.damaged"
    assert start_point(saved, []).checkpoint == path_of(saved, 4)


def test_only_as_many_are_read_as_are_needed(saved):
    path_of(saved, 2).write_bytes(b"")
    assert start_point(saved, []).step == 6
    assert path_of(saved, 2).exists()


def test_none_left_is_an_error_and_stays_one(saved, capsys):
    assert start_point(saved / "nothing yet", []).checkpoint is None
    for step in (2, 4, 6):
        path_of(saved, step).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match="all checkpoints are damaged"):
            start_point(saved, [])
    newer, middle, oldest = capsys.readouterr().out.splitlines()
    assert all(line.endswith("trying the one before it") for line in (newer, middle))
    assert str(path_of(saved, 2)) in oldest and "trying" not in oldest
