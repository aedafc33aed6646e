"""Checkpoints that have gone bad on the disk: a run resumes from the newest one that is whole, to the same end."""

import json
import shutil

import pytest

from damage import flip_a_bit
from hdm_lightning.training.checkpoint_io import checkpoints_in

TWO = {"px16": {"samples": 32, "save_every": 8}, "px24": {"samples": 24, "save_every": 8, "resolution": 24}}
KEEP = {"progress": None, "weight_averages": {"halflife_samples": [16]}, "checkpoint": {"keep": 3}}


def cut(path):
    path.write_bytes(path.read_bytes()[:-5000])


def stage(run, number):
    return checkpoints_in(run.stage_folder(number) / "checkpoints")


@pytest.fixture
def whole(toy, server):
    """A finished run of two stages."""
    run = toy("whole", TWO, callbacks=KEEP)
    assert server.run(run) == [0]
    return run


def unfinished(whole, toy, name, *, without_second):
    """A copy of a finished run, as if it had been killed before its export, or before its second stage."""
    run = toy(name, TWO, callbacks=KEEP)
    shutil.copytree(whole.folder, run.folder)
    shutil.rmtree(run.folder / "final")
    if without_second:
        shutil.rmtree(run.stage_folder(2))
    else:
        (run.stage_folder(2) / "done.json").unlink()
    return run


@pytest.mark.parametrize("damage", [cut, flip_a_bit])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_gone_on_from(whole, toy, server, same, damage):
    run = unfinished(whole, toy, damage.__name__, without_second=False)
    newest = stage(run, 2)[-1]
    damage(newest)
    assert server.run(run, 2) == [0, 0]
    told = server.log.read_text()
    assert f"{newest} is damaged" in told and "Traceback" not in told
    assert run.checkpoints(2) == whole.checkpoints(2)
    assert not list(run.folder.rglob("*.damaged"))  # that step has been saved again
    assert (run.folder / "final" / "model_index.json").exists()


def test_damage_found_at_the_export_of_a_run_that_is_done_is_trained_over(whole, toy, server, same):
    run = toy("done", TWO, callbacks=KEEP)
    shutil.copytree(whole.folder, run.folder)
    flip_a_bit(stage(run, 2)[-1])
    assert server.run(run) == [0]
    assert same(whole.end(2), run.end(2))
    assert (run.folder / "final" / "model_index.json").exists()


def test_damaged_older_checkpoints_do_not_hold_up_a_whole_newest_one(whole, toy, server, same):
    run = unfinished(whole, toy, "older", without_second=False)
    for path in [*stage(run, 2)[:-1], *stage(run, 1)]:
        cut(path)
    assert server.run(run) == [0]
    assert same(whole.end(2), run.end(2))


def test_a_stage_whose_end_is_damaged_is_trained_to_it_again_before_the_next_begins(whole, toy, server, same):
    run = unfinished(whole, toy, "between", without_second=True)
    flip_a_bit(stage(run, 1)[-1])
    assert server.run(run) == [0]
    assert "the checksum of" in server.log.read_text()
    assert same(whole.end(1), run.end(1))
    assert same(whole.end(2), run.end(2))
    done = [json.loads((each.stage_folder(1) / "done.json").read_text())["validation"] for each in (whole, run)]
    assert done[0] == done[1]


def test_where_none_is_left_the_run_does_not_begin_anew_unasked(whole, toy, server):
    run = unfinished(whole, toy, "none", without_second=False)
    for path in stage(run, 2):
        path.write_bytes(b"")
    for _ in range(2):
        assert server.run(run) == [2]
        told = server.log.read_text()
        assert "all checkpoints are damaged" in told and "delete the folder" in told
    shutil.rmtree(run.stage_folder(2) / "checkpoints")
    assert server.run(run) == [0]
