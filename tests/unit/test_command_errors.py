"""How commands end."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdm_lightning.cli.command import progress_bars, require_file, require_folder, require_platform, run_command
from hdm_lightning.cli.hydra_app import run_hydra
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.recorded_numbers import read_recorded
from hdm_lightning.generation.loading import adapter_and_base
from hdm_lightning.interop.adapter_files import write_adapter_file
from hdm_lightning.interop.adapter_layers import LowRank
from hdm_lightning.interop.adapters import Adapter
from hdm_lightning.training.base_model import base_folder
from hdm_lightning.training.stop_request import StopRequest


def fail() -> None:
    raise UserError("is wrong", where="some.key", hint="make it right")


def test_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 3) == 3
    assert run_command(fail) == 2
    assert capsys.readouterr().err == "error: some.key: is wrong\n  hint: make it right\n"


def test_windows_is_refused_with_the_way_out_and_other_systems_are_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    require_platform.cache_clear()
    require_platform("linux")
    assert capsys.readouterr().err == ""
    require_platform("darwin")
    assert "darwin" in capsys.readouterr().err
    with pytest.raises(UserError) as caught:
        require_platform("win32")
    assert caught.value.hint is not None and "WSL2" in caught.value.hint


def test_the_stack_trace_is_there_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDM_TRACEBACK", "1")
    with pytest.raises(UserError):
        run_command(fail)


def gpu_is_full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has …")


@pytest.mark.parametrize(
    "spend",
    [
        lambda: bytes(1 << 60),
        lambda: np.ones((1 << 20, 1 << 20, 1 << 10)),
        lambda: torch.zeros(1 << 50),
        lambda: [0] * (1 << 58),
        gpu_is_full,
    ],
)
def test_memory_that_is_spent_is_told_with_what_helps(
    spend: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        spend()

    assert run_command(command) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: there is not enough memory (") and "hint: use smaller batches" in told


def test_defects_keep_their_stack_trace() -> None:
    def defect() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_command(defect)


REFUSALS = {
    "a folder in the place of a file": lambda root: root.write_bytes(b"x"),
    "a file in the place of a folder": lambda root: (root / "file" / "x").write_text("x"),
    "a name that is too long": lambda root: (root / ("x" * 300)).write_text("x"),
    "a link to itself": lambda root: (root / "loop").read_text(),
    "a full disk": lambda root: os.write(os.open("/dev/full", os.O_WRONLY), b"x"),
    "a full disk, named": lambda root: Path("/dev/full").write_bytes(b"x"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_the_file_system_refuses_is_no_stack_trace(tmp_path: Path, capsys, kind: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert run_command(lambda: REFUSALS[kind](tmp_path)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "hint: " in told and "Traceback" not in told
    assert "full" in told if "disk" in kind else str(tmp_path) in told


def test_a_missing_file_that_nobody_checked_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run_command((tmp_path / "none").read_text)


def test_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert run_command(interrupt) == 130


def test_an_interruption_before_a_training_began_is_told_in_one_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["hdm-demo"])
    assert run_hydra(interrupt, "demo") == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "{here}/file/x"])
@pytest.mark.parametrize("arguments", [["hydra.run.dir={place}"], ["-m", "seed=0,1", "hydra.sweep.dir={place}"]])
def test_a_folder_that_hydra_cannot_make_is_told(tmp_path, monkeypatch, capsys, place, arguments) -> None:
    (tmp_path / "file").write_text("mine")
    place = place.format(here=tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["hdm-demo", *(each.format(place=place) for each in arguments)])
    assert run_hydra(lambda config: pytest.fail("there is no folder to work in"), "demo") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {place.removesuffix('/y')}") and "hydra.sweep.dir" in told


def test_a_sweep_that_could_not_begin_is_no_matter_of_the_next_call(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("sys.argv", ["hdm-demo", "-m", "seed=0,1", "hydra.sweep.dir=file/x"])
    assert run_hydra(lambda config: None, "demo") == 2
    monkeypatch.setattr("sys.argv", ["hdm-demo", "run_dir=here"])
    assert run_hydra(lambda config: None, "demo") == 0


def test_a_file_that_a_job_does_not_find_is_no_folder_of_hydra(tmp_path, monkeypatch) -> None:
    """That would be a fault of the job, whose stack trace is wanted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["hdm-demo", "run_dir=here"])
    with pytest.raises(FileNotFoundError):
        run_hydra(lambda config: Path("nowhere").read_text(), "demo")


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    pid = os.fork()
    if pid == 0:
        with StopRequest().listening():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130


PRINTING = """
import sys
from hdm_lightning.cli.command import run_command
def body():
    for _ in range({lines}):
        print("x" * 100)
    return {status}
sys.exit(run_command(body))
"""


def piped(code: str, *, reads: int) -> tuple[int, str]:
    """Status and errors of a Python process whose output is read to so many bytes and then left alone."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    os.read(process.stdout.fileno(), reads) if reads else None
    process.stdout.close()
    told = process.stderr.read().decode()
    return process.wait(), told


@pytest.mark.parametrize(("lines", "reads"), [(1, 0), (3, 0), (100_000, 100), (100_000, 5000)])
def test_a_reader_that_has_seen_enough_is_no_error(lines: int, reads: int) -> None:
    assert piped(PRINTING.format(lines=lines, status=0), reads=reads) == (0, "")


def test_another_broken_pipe_is_a_defect() -> None:
    def body() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_command(body)


def test_a_training_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    code = f"""
import sys
from hdm_lightning.training.worker import lasting_output
with lasting_output():
    for _ in range(1000):
        print("x" * 1000, flush=True)
        print("x" * 1000, file=sys.stderr)
    open({str(tmp_path / "done")!r}, "w").close()
"""
    assert piped(code, reads=10)[0] == 0
    assert (tmp_path / "done").exists()


def test_a_bar_that_has_nothing_to_show_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError), progress_bars():
        raise UserError("does not exist", where="runs/mine")
    assert capsys.readouterr().err == ""
    with progress_bars() as report:
        report("images", 1, 2)
        report("images", 2, 2)
    assert "images" in (told := capsys.readouterr().err) and "2/2" in told


@pytest.mark.parametrize("place", ["file", "file/x", "lost", "lost/x/y", "/proc/x", "/proc/x/y", "/dev/null"])
def test_where_nothing_can_be_written_is_found_before_any_work(tmp_path: Path, place: str) -> None:
    """Not by rights alone: a file system may refuse files, and a link lead to a disk that is not mounted."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "lost").symlink_to(tmp_path / "disk")
    for require in (require_folder, lambda folder, where: require_file(folder / "result.json", where)):
        with pytest.raises(UserError, match="is not a writable folder") as caught:
            require(tmp_path / place, "--out")
        assert caught.value.where == "--out"
    assert require_folder(tmp_path / "a" / "b", "--out") == tmp_path / "a" / "b"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "lost"]


@pytest.mark.parametrize("refuse", [lambda place: base_folder(str(place)), read_recorded, adapter_and_base])
def test_a_command_in_a_hint_works_with_any_path(tmp_path: Path, refuse: Callable[[Path], Any]) -> None:
    place = tmp_path / "my model; x"
    if refuse is adapter_and_base:
        write_adapter_file(place, Adapter({"a": LowRank.of(torch.ones(1, 2), torch.ones(2, 1), 1.0)}), "lora")
    else:
        place.mkdir()
    with pytest.raises(UserError) as caught:
        refuse(place)
    assert caught.value.hint and str(place) in shlex.split(caught.value.hint.replace("`", " "))
