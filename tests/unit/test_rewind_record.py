"""From which checkpoint a stage goes on after rewinds, and files of lines that a crash cut short."""

import errno
import gc

import pytest
import torch

from hdm_lightning import whole_files
from hdm_lightning.errors import UserError
from hdm_lightning.training.callbacks.throughput import memory_gb
from hdm_lightning.training.checkpoint_io import checkpoint_path, checkpoints_in, read_checkpoint
from hdm_lightning.training.rewind import (
    Rewind,
    StartPoint,
    read_rewinds,
    remove_superseded,
    start_point,
    write_rewind,
)
from hdm_lightning.whole_files import append_line, read_lines

GUARD = "GuardLoss"


def save(folder, step, skipped=0, rewinds=0, streak=0):
    folder.mkdir(exist_ok=True)
    path = checkpoint_path(folder, step)
    position = {"step": step, "skipped": skipped, "rewinds": rewinds}
    torch.save({"hdm": position, "state_dict": {}, "callbacks": {GUARD: {"streak": streak}}}, path)
    return path


def rewind(checkpoint_step, skipped):
    return Rewind("reason", checkpoint_step + 1, checkpoint_step, 0, 8, skipped, ["a"], ["a", "b"])


def test_without_rewinds_the_newest_checkpoint(tmp_path):
    assert start_point(tmp_path / "none", []) == StartPoint(None, 0, 0, 0)
    save(tmp_path / "c", 2)
    newest = save(tmp_path / "c", 4)
    assert start_point(tmp_path / "c", []) == StartPoint(newest, 4, 0, 0)


def test_a_rewind_adds_to_what_its_checkpoint_skips(tmp_path):
    path = save(tmp_path, 4, skipped=8)
    start = start_point(tmp_path, [rewind(4, 24), rewind(4, 40)])
    assert start == StartPoint(path, 4, 40, 2)
    assert start.consumed(batch_size=8) == 4 * 8 + 40


def test_a_later_checkpoint_holds_its_own_count(tmp_path):
    save(tmp_path, 4)
    path = save(tmp_path, 6, skipped=24, rewinds=1)
    assert start_point(tmp_path, [rewind(4, 24)]) == StartPoint(path, 6, 24, 1)


def test_a_checkpoint_behind_which_a_later_rewind_went_is_passed_over_and_removed(tmp_path):
    """Step 6 was saved while the loss was high; the kill came between the record and its removal."""
    good = save(tmp_path, 4)
    save(tmp_path, 6, streak=1)
    records = [rewind(4, 24)]
    start = start_point(tmp_path, records)
    assert start == StartPoint(good, 4, 24, 1)
    remove_superseded(tmp_path, start)
    assert checkpoints_in(tmp_path) == [good]
    again = save(tmp_path, 6, skipped=24, rewinds=1)
    assert start_point(tmp_path, records) == StartPoint(again, 6, 24, 1)
    remove_superseded(tmp_path, StartPoint(None, 0, 0, 2))
    assert checkpoints_in(tmp_path) == []


def test_calm_checkpoints_come_first_but_any_is_better_than_none(tmp_path):
    calm = save(tmp_path / "a", 2)
    save(tmp_path / "a", 4, streak=2)
    assert start_point(tmp_path / "a", [], calm=True).checkpoint == calm
    only = save(tmp_path / "b", 4, streak=2)
    assert start_point(tmp_path / "b", [], calm=True).checkpoint == only


def test_the_record_is_read_as_written_and_survives_a_line_cut_short(tmp_path):
    write_rewind(tmp_path, rewind(4, 8))
    with (tmp_path / "rewinds.jsonl").open("a") as file:
        file.write('{"reason": "cut sh')
    write_rewind(tmp_path, rewind(6, 16))
    assert read_rewinds(tmp_path) == [rewind(4, 8), rewind(6, 16)]


def test_a_checkpoint_read_lazily_takes_no_memory_until_it_is_used(tmp_path):
    path = tmp_path / "large.ckpt"
    torch.save({"a": torch.ones(50_000_000)}, path)
    gc.collect()  # else what earlier tests left may go in between
    before = memory_gb(torch.device("cpu"))["host"]
    lazy = read_checkpoint(path, lazily=True)
    assert memory_gb(torch.device("cpu"))["host"] - before < 0.05
    whole = read_checkpoint(path)
    assert memory_gb(torch.device("cpu"))["host"] - before == pytest.approx(0.2, abs=0.05)
    assert torch.equal(lazy["a"], whole["a"])


def test_lines_on_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": 1})

    def full(name, flags):
        assert name == str(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole_files, "no_follow", full)
    with pytest.raises(UserError, match="disk is full"):
        append_line(path, {"a": 2})
    assert read_lines(path) == [{"a": 1}]
