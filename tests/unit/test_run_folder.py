"""What a run's folder holds after somebody has been at it: deleted checkpoints, damaged records, no permissions."""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from hdm_lightning.errors import UserError
from hdm_lightning.training import run_folder
from hdm_lightning.training.callbacks.keep_ledger import Ledger
from hdm_lightning.training.checkpoint_io import AtomicCheckpointIO, checkpoint_path
from hdm_lightning.training.job import _check_names
from hdm_lightning.training.recorded import read_recorded, recorded_settings
from hdm_lightning.training.rewind import read_rewinds
from hdm_lightning.training.sweep_results import read_results
from hdm_lightning.whole_files import read_lines

RANDOM = random.Random(0)


class Plan(SimpleNamespace):
    def folder(self, run_dir: Path) -> Path:
        return run_dir / f"{self.number:02d}-{self.name}"


PLANS = [Plan(number=number, name=name) for number, name in ((1, "a"), (2, "b"), (3, "c"))]


def save(run: Path, plan: Plan, step: int = 4, *, done: bool = True) -> Path:
    path = checkpoint_path(run_folder.checkpoint_folder(run, plan), step)
    content = {"hdm": {"step": step}, "state_dict": {"network.a": torch.zeros(3)}, "callbacks": {}}
    AtomicCheckpointIO().save_checkpoint(content, path)
    if done:
        run_folder.mark_stage_done(run, plan, {"steps": step})
    return path


def finish(run: Path) -> None:
    (run / "final").mkdir()
    for name in ("README.md", "model_index.json"):
        (run / "final" / name).touch()


def test_checkpoints_that_are_needed_no_more_may_be_deleted(tmp_path: Path) -> None:
    for plan in PLANS[:2]:
        save(tmp_path, plan)
    save(tmp_path, PLANS[2], done=False)
    checkpoint_path(run_folder.checkpoint_folder(tmp_path, PLANS[0]), 4).unlink()
    assert run_folder.next_stage(tmp_path, PLANS) is PLANS[2]
    checkpoint_path(run_folder.checkpoint_folder(tmp_path, PLANS[1]), 4).unlink()
    assert run_folder.next_stage(tmp_path, PLANS) is PLANS[2]
    run_folder.mark_stage_done(tmp_path, PLANS[2], {"steps": 4})
    finish(tmp_path)
    checkpoint_path(run_folder.checkpoint_folder(tmp_path, PLANS[2]), 4).unlink()
    assert run_folder.next_stage(tmp_path, PLANS) is None


@pytest.mark.parametrize("number", [1, 2, 3])
def test_those_that_are_needed_are_missed_and_the_hint_helps(tmp_path: Path, number: int) -> None:
    for plan in PLANS[:number]:
        save(tmp_path, plan)
    gone = checkpoint_path(run_folder.checkpoint_folder(tmp_path, PLANS[number - 1]), 4)
    kept = gone.read_bytes()
    gone.unlink()
    with pytest.raises(UserError, match="its last checkpoint, which is needed now, is gone") as caught:
        run_folder.next_stage(tmp_path, PLANS)
    assert caught.value.where == str(gone.parent)
    gone.write_bytes(kept)
    assert run_folder.next_stage(tmp_path, PLANS) is (PLANS[number] if number < 3 else None)
    gone.unlink()
    (PLANS[number - 1].folder(tmp_path) / "done.json").unlink()
    assert str(PLANS[number - 1].folder(tmp_path) / "done.json") in str(caught.value.hint)
    assert run_folder.next_stage(tmp_path, PLANS) is PLANS[number - 1]


def damages(content: bytes) -> list[bytes]:
    """A file cut, emptied, zeroed, with bytes changed, and replaced by other JSON."""
    found = [
        b"",
        b"\0" * 40,
        content[: len(content) // 2],
        b"null",
        b"[1]",
        b"3",
        b'"x"',
        b"{}",
        b"[" * 99_999,
        b"\xff",
    ]
    for _ in range(90):
        broken = bytearray(content)
        for _ in range(RANDOM.randint(1, 4)):
            broken[RANDOM.randrange(len(broken))] = RANDOM.randrange(256)
        found.append(bytes(broken))
    return found


REWIND = {
    "time": "t", "reason": "r", "step": 3, "checkpoint_step": 2, "first": 16, "end": 24, "skipped": 8,
    "suspects": ["a"], "keys": ["a", "b"], "keys_forgotten": 0,
}  # fmt: skip


def test_a_cost_beyond_all_floats_counts_nothing(tmp_path: Path) -> None:
    lines = [{"event": "end", "seconds": seconds} for seconds in (2.0, 10**400, 3)]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Ledger(tmp_path / "ledger.jsonl").spent("seconds") == 5.0


def test_damaged_records_are_read_or_refused_by_name(tmp_path: Path) -> None:
    """A damaged done.json is none; of a ledger the whole lines count; a damaged rewind is refused or a line less."""
    done = PLANS[0].folder(tmp_path) / "done.json"
    save(tmp_path, PLANS[0])
    for broken in damages(json.dumps({"stage": "a", "steps": 4, "samples": 32}).encode()):
        done.write_bytes(broken)
        assert run_folder.stage_end(tmp_path, PLANS[0]) in (None, checkpoint_path(done.parent / "checkpoints", 4))
    whole = [{"event": "start", "stage": "a"}, {"event": "end", "stage": "a", "seconds": 2.0, "cost_usd": 1.0}]
    for broken in damages(b"\n".join(json.dumps(line).encode() for line in whole)):
        (tmp_path / "ledger.jsonl").write_bytes(broken)
        ledger = Ledger(tmp_path / "ledger.jsonl")
        assert ledger.spent("seconds") >= -1e9 and ledger.starts("a") in (0, 1)
        assert all(isinstance(line, dict) for line in read_lines(tmp_path / "ledger.jsonl"))
    refused = 0
    for broken in damages(json.dumps(REWIND).encode()):
        (tmp_path / "rewinds.jsonl").write_bytes(broken)
        try:
            assert len(read_rewinds(tmp_path)) <= 1
        except UserError as error:
            assert error.where == str(tmp_path / "rewinds.jsonl") and error.hint
            refused += 1
    assert refused > 3


def test_a_folder_in_the_place_of_a_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        Ledger(tmp_path / "ledger.jsonl").events()
    with pytest.raises(UserError, match=r"ledger\.jsonl: cannot be written to"):
        run_folder.require_writable(tmp_path, PLANS)


def test_a_sweep_with_damaged_jobs_has_its_summary(tmp_path: Path) -> None:
    for number, broken in enumerate(damages(b'{"validation": {"raw": 1.0, "ema": 0.5}}')):
        job = tmp_path / f"job{number}"
        (job / ".hydra").mkdir(parents=True)
        (job / ".hydra" / "overrides.yaml").write_bytes(broken if number % 2 else b"- seed=1\n")
        (job / "01-a").mkdir()
        (job / "01-a" / "done.json").write_bytes(broken)
        if number % 3:
            finish(job)
        else:
            (job / "failed.json").write_bytes(broken)
    assert len(read_results(tmp_path, {})) == 100


def test_a_damaged_configuration_is_refused_with_a_way_out(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for broken in damages(b"name: a\nmodel:\n  width: 64\n  depth: 1\nschedule: {stages: {px64: {samples: 64}}}\n"):
        file.write_bytes(broken)
        try:
            assert isinstance(read_recorded(file), dict)
        except UserError as error:
            assert str(file) in str(error) and error.hint
    file.write_bytes(b"  \n")
    with pytest.raises(UserError, match="is empty") as caught:
        read_recorded(file)
    assert "delete it" in str(caught.value.hint)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


PLACES = ["above", "above/run", "above/run/01-a", "above/run/01-a/checkpoints", "above/run/03-c"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["permissions", "file"])
def test_what_cannot_be_written_to_is_found_at_the_start(open_folder: Path, place: str, kind: str) -> None:
    target, run = open_folder / place, open_folder / "above" / "run"
    for folder in [*reversed(target.relative_to(open_folder).parents)][1:]:
        (open_folder / folder).mkdir()
        (open_folder / folder).chmod(0o777)
    assert told_without_rights(run) == "nothing"
    if kind == "file":
        target.write_text("")
    else:
        target.mkdir(mode=0o555)
    told = told_without_rights(run)
    assert f"{target}: cannot be written to" in told and "run_dir=" in told


@pytest.mark.parametrize(
    "name",
    [
        *("final", "final/transformer", "final/a/b", "hparams", "ema_snapshots", "wandb"),
        *("01-a", "01-a/checkpoints", "01-a/samples", "01-a/tensorboard", "02-b/version_0"),
    ],
)
def test_a_run_s_folder_that_leads_elsewhere_is_refused_and_one_inside_or_the_run_itself_is_not(
    tmp_path: Path, name: str
) -> None:
    run, elsewhere, linked = tmp_path / "run", tmp_path / "elsewhere", tmp_path / "linked"
    (run / name).parent.mkdir(parents=True)
    elsewhere.mkdir()
    linked.symlink_to(run, target_is_directory=True)
    (elsewhere / "notes").write_text("mine")
    (run / name).symlink_to(elsewhere, target_is_directory=True)
    for folder in (run, linked):
        with pytest.raises(UserError, match="is a link to") as caught:
            run_folder.require_writable(folder, PLANS)
        assert caught.value.where == str(folder / name)
    (run / name).unlink()
    (run / "inside").mkdir()
    (run / name).symlink_to(run / "inside", target_is_directory=True)
    run_folder.require_writable(run, PLANS)
    run_folder.require_writable(linked, PLANS)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        *(("final", "model_index.json"), ("01-a", "checkpoints"), ("01-a/checkpoints", "step-00000008.ckpt")),
        *(("01-a/samples", "000000000032-64x64.png"), ("01-a/tensorboard", "events.out.tfevents.1.host.2.0")),
        *(("ema_snapshots", "000000000032-0.100.safetensors"), ("final", ""), ("01-a/samples", "")),
        *(("01-a/csv", "version_0"), ("mlruns", ".trash"), ("mlruns", "271828182845904523")),
    ],
)
def test_a_link_to_a_larger_disk_is_followed_where_who_trains_has_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inside: str
) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    (run / name).parent.mkdir(parents=True)
    disk.mkdir()
    if inside:
        (disk / inside).mkdir()
    (run / name).symlink_to(disk, target_is_directory=True)
    run_folder.require_writable(run, PLANS)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)  # another user's run
    with pytest.raises(UserError, match="is a link to") as caught:
        run_folder.require_writable(run, PLANS)
    assert caught.value.where == str(run / name)
    assert [path.name for path in disk.iterdir()] == [inside] * bool(inside)


@pytest.mark.parametrize(
    "names", [[".hydra"], [".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/hydra.yaml"]], ids=["folder", "files"]
)
@pytest.mark.parametrize("sweeps", [False, True])
def test_hydra_writes_its_files_through_no_link(tmp_path: Path, names: list[str], sweeps: bool) -> None:
    """It does so before any check of ours, in the folder of a run that somebody may have sent."""
    run, elsewhere = tmp_path / "sweep" / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in ("config.yaml", "overrides.yaml", "hydra.yaml"):
        (elsewhere / file).write_text("mine")
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).symlink_to(elsewhere if name == ".hydra" else elsewhere / "config.yaml")
    (run.parent / "multirun.yaml").symlink_to(elsewhere / "overrides.yaml")
    here = ["-m", f"hydra.sweep.dir={run.parent}", "hydra.sweep.subdir=run"] if sweeps else [f"hydra.run.dir={run}"]
    command = [sys.executable, "-c", ONE_JOB, *here, "+name=toy", CALLBACK]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert all(file.read_text() == "mine" for file in elsewhere.iterdir()) and len(list(elsewhere.iterdir())) == 3
    assert not any((run / name).is_symlink() for name in names)
    assert "name: toy" in (run / ".hydra" / "config.yaml").read_text()


ONE_JOB = """
import hydra
hydra.main(config_path=None, version_base="1.3")(lambda config: None)()
"""


CALLBACK = "+hydra.callbacks.sweep._target_=hdm_lightning.cli.sweep.NoteSweep"


def told_without_rights(run: Path) -> str:
    """What is said of a run's folder to a user who is not root, in a process of its own."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        told = "nothing"
        try:
            if os.getuid() == 0:
                os.setegid(65534)
                os.seteuid(65534)
            run_folder.require_writable(run, PLANS)
        except BaseException as error:
            told = str(error) if isinstance(error, UserError) else repr(error)
        finally:
            os.write(tell, told.encode())
            os._exit(0)
    os.close(tell)
    with os.fdopen(ready) as said:
        told = said.read()
    os.waitpid(pid, 0)
    return told


def test_an_environment_that_cannot_be_read_says_nothing(tmp_path):
    assert run_folder.read_environment(tmp_path) == {}
    (tmp_path / run_folder.ENVIRONMENT).write_text('{"commit": ')
    assert run_folder.read_environment(tmp_path).get("commit") is None
    (tmp_path / run_folder.ENVIRONMENT).write_text('{"commit": "abc"}')
    assert run_folder.read_environment(tmp_path) == {"commit": "abc"}


@pytest.mark.parametrize("name", ["", " ", ".", "..", "/", "/tmp/x", "../x", "a/../../x", "a/.", None, True, [1]])
def test_a_name_that_leads_out_of_runs_is_refused(name: object) -> None:
    with pytest.raises(UserError) as caught:
        _check_names(OmegaConf.create({"name": name, "run_dir": f"runs/{name}", "seed": 0}))
    assert caught.value.where == "name" and caught.value.hint


@pytest.mark.parametrize("name", ["a", "...", "a..b", "n/deep/x", "🦊.v1", "a[1]=b (2)", 7, 1.5, "-"])
def test_other_names_are_taken(name: object) -> None:
    _check_names(OmegaConf.create({"name": name, "run_dir": "../anywhere", "seed": 0}))


@pytest.mark.parametrize(
    "text",
    [
        "model: {}\nschedule: {}\n",
        "model: {}\nschedule: {stages: {}}\n",
        "model: {}\nschedule: {stages: {a: {samples: many}}}\n",
        "model: {}\nschedule: {stages: [1]}\n",
        "model: {_target_: os.system, command: id}\nschedule: {}\n",
    ],
)
def test_settings_of_others_that_are_none_name_the_file_and_not_a_key_of_the_command(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="schedule") as caught:
        recorded_settings(file)
    assert caught.value.where == str(file) and caught.value.hint
