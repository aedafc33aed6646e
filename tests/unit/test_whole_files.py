"""A file is the old one or the new one, whatever happens meanwhile, as open as the umask says, and never another's."""

import errno
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hdm_lightning.cli.command import run_command
from hdm_lightning.data.faults import Quarantine
from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.generation.image_files import ImageRecord, write_png
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.interop.tensor_files import write_tensors
from hdm_lightning.training import worker
from hdm_lightning.training.callbacks.keep_ledger import Ledger
from hdm_lightning.training.checkpoint_io import AtomicCheckpointIO
from hdm_lightning.whole_files import (
    is_disk_full,
    make_folder,
    remove_leftovers,
    replacing,
    write_atomically,
    write_text,
)


@contextmanager
def umask(value):
    """Work under another umask."""
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path):
    """Permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


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


def test_a_full_disk_is_recognised_by_the_text_of_safetensors():
    """Its Rust error names the number alone."""
    from safetensors import SafetensorError

    assert is_disk_full(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"))


def test_folders_and_devices_are_not_replaced(tmp_path):
    for place in (tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="not a regular file"):
            write_text(place, "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_folder_below_a_link_that_leads_nowhere_is_called_so(tmp_path, below):
    """As where a disk is not mounted; the system says of the link that it exists."""
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "runs")
    place = tmp_path / "runs" / below
    for make in (make_folder, lambda folder: write_text(folder / "a.txt", "x")):
        told = run_command(lambda make=make: make(place) or 0)
        assert told == 2
    with pytest.raises(UserError, match="which does not exist") as caught:
        make_folder(place)
    assert caught.value.where == str(tmp_path / "runs") and "mount" in caught.value.hint


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_every_kind_of_file_is_as_open_as_the_umask_says(tmp_path, tiny_autoencoder, mask):
    tensors = {"x": torch.zeros(2)}
    with umask(mask):
        AtomicCheckpointIO().save_checkpoint(tensors, tmp_path / "a.ckpt")
        write_tensors(tmp_path / "a.safetensors", tensors)
        write_tensors(tmp_path / "a.pt", tensors)
        record = ImageRecord("a cat", 0, SamplingSettings(height=8, width=8), "model", "0" * 64)
        write_png(tmp_path / "a.png", torch.zeros(3, 8, 8, dtype=torch.uint8), record)
        load_autoencoder(str(tiny_autoencoder)).save(tmp_path / "copied")
        encoder = load_autoencoder(str(tiny_autoencoder))
        encoder.source = None
        encoder.save(tmp_path / "saved")
        Ledger(tmp_path / "ledger.jsonl", writes=True).append("start")
        Quarantine(str(tmp_path / "bad.jsonl")).add(shard="s", key="k", ordinal=0, reason="r", index=0)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.json", "diffusion_pytorch_model.safetensors", "bad.jsonl"}
    assert {path.name: oct(mode(path)) for path in files} == {path.name: oct(0o666 & ~mask) for path in files}


LINKED = {
    "lock": ("run.lock", lambda folder: os.close(worker.take(folder))),
    "ledger": ("ledger.jsonl", lambda folder: Ledger(folder / "ledger.jsonl", writes=True).append("start")),
    "quarantine": (
        "quarantine.jsonl",
        lambda folder: Quarantine(str(folder / "quarantine.jsonl")).add(
            shard="s", key="k", ordinal=0, reason="r", index=0
        ),
    ),
}


@pytest.mark.parametrize("kind", LINKED)
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_a_file_to_go_on_with_is_refused(tmp_path, kind, there):
    """Also one that leads to a file not made yet."""
    name, write = LINKED[kind]
    victim = tmp_path / "authorized_keys"
    if there:
        victim.write_text("ssh-ed25519 AAAA\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(victim)
    with pytest.raises(UserError, match="symbolic link") as caught:
        write(run)
    assert caught.value.where == str(run / name)
    assert victim.read_text() == "ssh-ed25519 AAAA\n" if there else not victim.exists()


def test_a_link_in_the_place_of_a_file_to_replace_is_replaced(tmp_path, tiny_autoencoder):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.ckpt", "a.safetensors", "a.safetensors.part", "config.json", "diffusion_pytorch_model.safetensors"):
        (out / name).symlink_to(victim)
    AtomicCheckpointIO().save_checkpoint({}, out / "a.ckpt")
    write_tensors(out / "a.safetensors", {"x": torch.zeros(2)})
    load_autoencoder(str(tiny_autoencoder)).save(out)
    assert victim.read_text() == "mine"
    assert not (out / "a.ckpt").is_symlink() and not (out / "config.json").is_symlink()


def test_nobody_can_foresee_the_temporary_name(tmp_path):
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "a") as temporary:
            names.add(temporary.name)
    assert len(names) == 3
