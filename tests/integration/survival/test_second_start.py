"""A second start in the folder of a run that is at work: it is refused and changes nothing."""

import copy
import signal

import pytest

from composed import check_job, run_job
from hdm_lightning.errors import UserError
from hdm_lightning.training import worker
from hdm_lightning.training.callbacks.ends import ValidateAtEnds


@pytest.fixture
def starts(toy, toy_vae_config):
    """For each training: its folder, its start, and the callback that is called in its midst."""
    toy, vae = toy("toy", {"px16": {"samples": 16, "validate_every": 8}}), copy.deepcopy(toy_vae_config)
    vae["stage"] |= {"samples": 16, "validate_every": 8}
    folder = toy.folder.with_name("run")
    return {
        "flow": (toy.folder, lambda: run_job(check_job(toy.config)), ValidateAtEnds),
        "vae": (folder, lambda: run_job(check_job(vae)), ValidateAtEnds),
    }


@pytest.mark.parametrize("kind", ["flow", "vae"])
def test_one_start_at_a_time(starts, kind, monkeypatch, another_start, free):
    folder, start, callback = starts[kind]
    monkeypatch.setattr(worker, "PATIENCE_S", 0.2)
    with another_start(folder) as holder:
        with pytest.raises(UserError, match=f"process {holder} on "):
            start()
        assert [path.name for path in folder.iterdir()] == ["run.lock"]
    found, original = [], callback.on_validation_end

    def validated(self, trainer, module):
        found.append(not free(folder))
        original(self, trainer, module)

    monkeypatch.setattr(callback, "on_validation_end", validated)
    assert start() == 0
    assert len(found) >= 2 and all(found)
    assert free(folder)


def test_all_processes_of_a_second_start_end_and_one_tells(toy, server, another_start):
    ours = toy("ours")
    with another_start(ours.folder) as holder:
        statuses = server.run(ours, 2, lose_patience={"seconds": 0.2})
        assert [path.name for path in ours.folder.iterdir()] == ["run.lock"]
    assert statuses[0] == 2 and statuses[1] in (2, -signal.SIGTERM)
    told = server.log.read_text()
    assert told.count(f"error: run_dir: process {holder} on ") == 1 and "Traceback" not in told
    assert server.run(ours, 2) == [0, 0]


def test_a_start_after_a_kill_finds_the_folder_free(toy, server):
    ours = toy("ours")
    assert server.run(ours, 2, die={"at": "forward", "nth": 6, "how": "kill all", "on": 0}) == [-9, -9]
    assert (ours.folder / "run.lock").exists()
    assert server.run(ours, 2, lose_patience={"seconds": 0.0}) == [0, 0]
    assert "is using" not in server.log.read_text()
