"""A checkpoint is the old one or the new one, whatever happens while it is written."""

import errno

import pytest
import torch

from hdm_lightning.errors import UserError
from hdm_lightning.training.checkpoint_io import AtomicCheckpointIO, remove_leftovers, write_atomically


def test_round_trip_and_replacement(tmp_path):
    path = tmp_path / "a.ckpt"
    for value in (1.0, 2.0):
        AtomicCheckpointIO().save_checkpoint({"x": torch.tensor(value)}, path)
        assert torch.load(path, weights_only=True)["x"].item() == value
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] unexpected pos 64 vs 0")],
)
def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, failure):
    path = tmp_path / "a.ckpt"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise failure

    with pytest.raises(UserError, match="disk is full") as caught:
        write_atomically(path, fail)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_other_failures_pass_through_and_leave_the_old_file(tmp_path):
    path = tmp_path / "a.ckpt"
    write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda file: file.write(bytes([1 // 0])))
    assert path.read_bytes() == b"old"


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".a.ckpt.x7.tmp").write_bytes(b"half")
    (tmp_path / "a.ckpt").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
