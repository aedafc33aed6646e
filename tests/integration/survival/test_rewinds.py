"""A loss that goes wrong: all processes rewind together and skip the samples that led there."""

import json

import pytest

from composed import check_job
from hdm_lightning.errors import UserError


def test_two_processes_skip_a_loss_that_is_not_finite(toy, server, trained_positions, same, tmp_path):
    poisoned, told = toy("poisoned"), toy("told")
    (tmp_path / "seen").mkdir()
    faults = {"poison": {"stage": "px16", "positions": [27, 30], "factor": None}}
    assert server.run(poisoned, 2, note_positions={"folder": str(tmp_path / "seen")}, **faults) == [0, 0]
    assert "rewind 1 of 3" in server.log.read_text()
    (rewind,) = poisoned.rewinds()
    assert (rewind["step"], rewind["checkpoint_step"], rewind["first"], rewind["end"]) == (4, 2, 16, 32)
    assert (rewind["skipped"], len(rewind["keys"]), rewind["keys_forgotten"]) == (16, 16, 0)
    assert len(rewind["suspects"]) == 2 and set(rewind["suspects"]) <= set(rewind["keys"])
    events = [json.loads(line)["event"] for line in (poisoned.folder / "ledger.jsonl").read_text().splitlines()]
    assert events.count("rewind") == 1

    steps = trained_positions([tmp_path / "seen"])["px16"]
    assert [position for step in sorted(steps) for position in steps[step]] == [*range(16), *range(32, 64)]

    assert server.run(told, 2, jump={"stage": "px16", "first": 16, "end": 32}) == [0, 0]
    assert same(poisoned.end(), told.end())


def test_a_spike_goes_back_to_the_checkpoint_before_it_began(toy, server, same):
    """Steps 4 and 5 are high; the checkpoint of step 4 was written when the loss was high already."""
    guard = {"spike_factor": 3.0, "spike_steps": 2, "warmup_steps": 2}
    spiked, told = toy("spiked", guard=guard), toy("told", guard=guard)
    faults = {"poison": {"stage": "px16", "positions": list(range(24, 40)), "factor": 30.0}}
    assert server.run(spiked, **faults) == [0]
    (rewind,) = spiked.rewinds()
    assert "running mean" in rewind["reason"]
    assert (rewind["step"], rewind["checkpoint_step"], rewind["first"], rewind["end"]) == (5, 2, 16, 40)
    assert len(rewind["keys"]) == 24 and len(rewind["suspects"]) == 8
    assert server.run(told, jump={"stage": "px16", "first": 16, "end": 40}) == [0]
    assert same(spiked.end(), told.end())


def test_a_stage_without_a_checkpoint_goes_back_to_its_beginning(toy, server, same):
    stages = {"px16": {"samples": 8}, "px24": {"samples": 16, "save_every": 0, "resolution": 24}}
    poisoned, told = toy("poisoned", stages), toy("told", stages)
    faults = {"poison": {"stage": "px24", "positions": [9], "factor": None}}
    assert server.run(poisoned, **faults) == [0]
    (rewind,) = poisoned.rewinds(2)
    assert (rewind["step"], rewind["checkpoint_step"], rewind["first"], rewind["end"]) == (2, 0, 0, 16)
    assert server.run(told, jump={"stage": "px24", "first": 0, "end": 16}) == [0]
    assert same(poisoned.end(2), told.end(2))


def test_a_stage_that_goes_back_to_its_beginning_takes_the_carried_moments_again(toy, server, same):
    """Those of the checkpoint, not what the steps that went wrong made of them."""
    stages = {"px16": {"samples": 8}, "px24": {"samples": 16, "save_every": 0, "resolution": 24}}
    schedule = toy(stages=stages).config["schedule"] | {"carry_moments": True}
    poisoned, told = toy("poisoned", schedule=schedule), toy("told", schedule=schedule)
    assert server.run(poisoned, poison={"stage": "px24", "positions": [9], "factor": None}) == [0]
    assert len(poisoned.rewinds(2)) == 1
    assert server.run(told, jump={"stage": "px24", "first": 0, "end": 16}) == [0]
    assert same(poisoned.end(2), told.end(2))


def test_rewinds_add_up_survive_a_kill_and_end_with_a_message(toy, server, same):
    """Poison in the first steps, and again each time after the window was skipped; two kills right after rewinds."""
    poison = {"stage": "px16", "positions": [3, 20, 33], "factor": None}
    die = {"at": "rewind noted", "nth": 1, "how": "kill", "on": None}
    windows = [(0, 0, 8), (0, 8, 24), (0, 24, 40)]
    whole, killed = toy("whole"), toy("killed", guard={"rewinds": 2})
    assert server.run(whole, poison=poison) == [0]
    assert [(r["checkpoint_step"], r["first"], r["end"]) for r in whole.rewinds()] == windows
    assert server.run(killed, poison=poison, die=die) == [-9]
    assert server.run(killed, poison=poison, die=die) == [-9]
    assert server.run(killed, poison=poison) == [2]
    told = server.log.read_text()
    assert "rewinds.jsonl" in told and "guard.rewinds" in told and "after 2 rewind(s)" in told
    assert len(killed.rewinds()) == 2
    killed.config["guard"]["rewinds"] = 3
    assert server.run(killed, poison=poison) == [0]
    assert same(whole.end(), killed.end())
    assert [r["skipped"] for r in killed.rewinds()] == [8, 24, 40]


@pytest.mark.parametrize(
    ("guard", "where"),
    [
        ({"spike_factor": 1.0}, "guard.spike_factor"),
        ({"spike_steps": 0}, "guard.spike_steps"),
        ({"warmup_steps": -1}, "guard.warmup_steps"),
        ({"rewinds": -1}, "guard.rewinds"),
        ({"rewind": 1}, "guard.rewind"),
    ],
)
def test_rules_that_make_no_sense_are_named(toy, guard, where):
    with pytest.raises(UserError) as caught:
        check_job(toy(guard=guard).config)
    assert caught.value.where == where
