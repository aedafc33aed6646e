"""The lock of a run's folder: held between processes, told with its holder, and gone when the holder is."""

import errno
import fcntl
import json
import os
import signal
import socket
import time

import pytest
from omegaconf import OmegaConf

from hdm_lightning.errors import UserError
from hdm_lightning.training import worker
from hdm_lightning.training.callbacks.stop_on_signal import StoppedBySignal
from hdm_lightning.training.schedule import run_schedule
from hdm_lightning.training.stop_request import STOP
from hdm_lightning.training.worker import alone_in, take


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE_S", 0.3)
    monkeypatch.setattr(worker, "POLL_S", 0.02)
    monkeypatch.setattr(STOP, "received", False)


def test_a_second_start_waits_and_is_told_who_holds_the_folder(tmp_path, capfd, another_start):
    folder = tmp_path / "run"
    with another_start(folder) as pid:
        begin = time.monotonic()
        with pytest.raises(UserError) as caught, alone_in(folder):
            pytest.fail("the folder is held")
        assert time.monotonic() - begin >= 0.3
    holder = f"process {pid} on {socket.gethostname()}"
    assert caught.value.what.startswith(holder) and str(folder) in caught.value.what
    assert caught.value.where == "run_dir" and "SIGTERM" in caught.value.hint
    assert capfd.readouterr().out.count(f"{holder} (since ") == 1


def test_a_start_goes_on_when_the_other_ends_in_time(tmp_path, monkeypatch, another_start, free):
    monkeypatch.setattr(worker, "PATIENCE_S", 30.0)
    with another_start(tmp_path, then=lambda: time.sleep(0.5)) as other, alone_in(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid() != other
    assert free(tmp_path)


def test_a_killed_holder_leaves_nothing_locked_though_its_children_live(tmp_path, another_start, free):
    """As data workers do, which are forked and outlive a killed process for a moment."""
    children, tell = os.pipe()

    def have_a_child():
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        os.write(tell, str(pid).encode())
        time.sleep(60)

    with another_start(tmp_path, then=have_a_child):
        child = int(os.read(children, 20))
        assert not free(tmp_path)
    try:
        os.kill(child, 0)  # it lives
        assert free(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_held_until_the_end_however_it_ends(tmp_path, free):
    for error in (None, ZeroDivisionError):
        with pytest.raises(error or StopIteration), alone_in(tmp_path):
            pid = os.fork()  # the end of a forked data worker takes nothing away
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            assert not free(tmp_path)
            raise error or StopIteration
        assert free(tmp_path)


def test_a_signal_ends_the_waiting(tmp_path, monkeypatch, another_start):
    monkeypatch.setattr(worker, "PATIENCE_S", 60.0)
    with another_start(tmp_path) as pid, STOP.listening():
        monkeypatch.setattr(worker.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedBySignal), alone_in(tmp_path):
            pytest.fail("the folder is held")
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == pid


def test_a_command_that_is_stopped_while_it_waits_has_the_status_of_one_that_is_stopped_later(
    tmp_path, monkeypatch, capfd, another_start
):
    monkeypatch.setattr(worker, "PATIENCE_S", 60.0)
    hardware = {"threads": 1, "compile_cache": False}
    config = {"run_dir": str(tmp_path), "resume": "auto", "trainer": {"accelerator": "cpu"}, "hardware": hardware}
    with another_start(tmp_path):
        monkeypatch.setattr(worker.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert run_schedule({"config": OmegaConf.to_yaml(config)}) == 143
    assert "before the first step" in capfd.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_nothing_can_be_locked_the_run_goes_on_with_a_warning(tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with alone_in(tmp_path):
        told = capsys.readouterr().out
    assert "cannot be locked" in told and os.strerror(number) in told


def test_a_full_disk_is_no_missing_lock(tmp_path, monkeypatch, free):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        take(tmp_path)
    monkeypatch.undo()
    assert free(tmp_path)
