"""Ranks from SLURM's variables, processes that end with their parent, and who tells an error first."""

import os
import signal
import socket
import sys
import time
from dataclasses import fields, make_dataclass
from functools import partial

import pytest
from omegaconf import OmegaConf

from hdm_lightning.errors import UserError
from hdm_lightning.training import launch as launch_module
from hdm_lightning.training import world
from hdm_lightning.training.job import _world_size
from hdm_lightning.training.launch import Failure, launch, read_failures, start_worker
from hdm_lightning.training.strategies import processes
from hdm_lightning.training.world import (
    adopt_outside_launch,
    from_slurm,
    launched_from_outside,
    outside_world_size,
    tasks_per_node,
)

TASK = {  # srun --nodes 2 --ntasks 6, third task of the second machine
    "SLURM_JOB_ID": "1234567",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}
OUTSIDE = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    for name in (*OUTSIDE, *TASK, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_task_of_srun_gets_torchruns_variables():
    assert from_slurm(TASK) == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "3",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(15_000 + 1234567 % 20_000),
    }
    assert from_slurm({**TASK, "MASTER_ADDR": "head", "MASTER_PORT": "99"})["MASTER_ADDR"] == "head"


def test_the_environment_is_filled_in_once(environment):
    for name, value in TASK.items():
        environment.setenv(name, value)
    for name in OUTSIDE:
        environment.setenv(name, "")  # put back at the end
        environment.delenv(name)
    assert launched_from_outside() and outside_world_size() == 6
    adopt_outside_launch()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("5", "6")
    os.environ["RANK"] = "3"
    adopt_outside_launch()
    assert os.environ["RANK"] == "3"


def test_a_batch_script_is_one_process_whatever_it_reserves(environment):
    environment.setenv("SLURM_NTASKS", "8")
    assert from_slurm(os.environ) == {}
    assert not launched_from_outside() and outside_world_size() is None


def test_torchrun_counts_as_outside(environment):
    environment.setenv("TORCHELASTIC_RUN_ID", "x")
    environment.setenv("WORLD_SIZE", "4")
    assert _world_size(OmegaConf.create({"trainer": {"num_nodes": 2}}), 1) == 4


def test_several_machines_need_a_launcher(environment):
    with pytest.raises(UserError, match="2 machines") as caught:
        _world_size(OmegaConf.create({"trainer": {"num_nodes": 2}}), 1)
    assert caught.value.where == "trainer.num_nodes"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("gpu[03-05,9],b", "gpu03"), ("n[7,9]", "n7"), ("r[1-2].x.org,b", "r1.x.org")],
)
def test_first_host_of_a_list(nodes, first):
    assert from_slurm({**TASK, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_tasks_per_node():
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    with pytest.raises(ValueError, match="4\\(x2\\),3"):
        tasks_per_node("four")


def forked(function):
    """Run a function in a forked process; returns its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(99)
    return pid


def exit_status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("error", "status"), [(UserError("too dear", where="key"), 2), (ValueError("a bug"), 1)])
def test_a_worker_writes_its_error_down_and_ends(error, status, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")

    def fail(order):
        raise error

    assert exit_status(forked(lambda: start_worker(str(tmp_path / "group"), fail, {}))) == status
    (failure,) = read_failures(tmp_path)
    assert failure.rank == 3 and str(error) in failure.text and ("Traceback" in failure.text) == (status == 1)


def test_a_process_started_from_outside_tells_its_error_once_and_ends(environment, tmp_path):
    """It does not go back into the command, which would wait for the others at its end."""
    environment.setenv("TORCHELASTIC_RUN_ID", "x")
    environment.setenv("RANK", "0")

    def fail(config):
        raise UserError("too dear", where="key")

    def command():
        os.dup2(os.open(tmp_path / "told", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        launch(fail, {}, 2)

    assert exit_status(forked(command)) == 2
    assert (tmp_path / "told").read_text().count("too dear") == 1
    environment.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="too dear"):  # alone it harms none, and a sweep goes on
        launch(fail, {}, 1)


def test_mistakes_are_told_before_other_errors_and_broken_connections_last(monkeypatch):
    errors = [RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), ZeroDivisionError()]
    failures = []
    for rank, error in enumerate([*errors, UserError("x"), UserError("x")]):
        monkeypatch.setenv("RANK", str(rank))
        failures.append(Failure.of(error))
    ranks = [failure.rank for failure in sorted(failures, key=Failure.importance)]
    assert ranks == [2, 3, 1, 0]


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), ValueError("no peers")])
def test_a_server_that_hangs_up_is_no_process_that_is_gone(error):
    """It is told as the error that it is: a hub's, a logger's or that of remote shards."""
    assert Failure.of(error).kind != "lost connection"


def test_a_lost_connection_waits_for_the_launcher(tmp_path, monkeypatch):
    """Which then sees the process that has died of itself."""

    def fail(order):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setenv("RANK", "0")
    pid = forked(lambda: start_worker(str(tmp_path / "group"), fail, {}))
    deadline = time.monotonic() + 30
    while not read_failures(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(pid, signal.SIGTERM)
    assert exit_status(pid) == -signal.SIGTERM


def test_a_worker_dies_with_its_parent(tmp_path):
    def parent():
        def worker(config):
            (tmp_path / "worker").write_text(str(os.getpid()))
            time.sleep(60)
            return 0

        forked(lambda: start_worker(str(tmp_path / "group"), worker, {}))
        time.sleep(60)

    pid = forked(parent)
    deadline = time.monotonic() + 30
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker = int((tmp_path / "worker").read_text())
    os.kill(pid, signal.SIGKILL)
    assert exit_status(pid) == -9
    while running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("local", "told"), [((2, 2, 2, 2), None), ((3, 3, 3, 1), "have 3, 1 processes")])
def test_machines_with_different_numbers_of_processes_are_refused(environment, tmp_path, local, told):
    """Four processes of two machines; each says the same."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def member(rank):
        first = local[0]
        os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="localhost", MASTER_PORT=str(port))
        os.environ.update(LOCAL_WORLD_SIZE=str(local[rank]), GROUP_RANK=str(int(rank >= first)), LOCAL_RANK="0")
        world.join_group("cpu")
        try:
            world.require_even_machines()
            (tmp_path / str(rank)).write_text("even")
        except UserError as error:
            (tmp_path / str(rank)).write_text(str(error))
        processes.barrier()
        os._exit(0)

    pids = [forked(partial(member, rank)) for rank in range(4)]
    assert [exit_status(pid) for pid in pids] == [0, 0, 0, 0]
    for rank in range(4):
        said = (tmp_path / str(rank)).read_text()
        words = ["even"] if told is None else [told, "trainer.num_nodes", "start 1 on each"]
        assert all(word in said for word in words)


def test_a_launcher_that_knows_no_shutdown_timeout_is_given_none(tmp_path, monkeypatch):
    """As torch's before 2.12."""
    known = [(each.name, object, None) for each in fields(launch_module.LaunchConfig)]
    older = make_dataclass("Older", [each for each in known if each[0] != "shutdown_timeout"])
    for kind, has in ((launch_module.LaunchConfig, True), (older, False)):
        monkeypatch.setattr(launch_module, "LaunchConfig", kind)
        made = launch_module._launch_config(2, tmp_path / "meet")
        assert (made.nproc_per_node, made.signals_to_handle) == (2, "SIGHUP,SIGQUIT")
        assert getattr(made, "shutdown_timeout", None) == (launch_module.SHUTDOWN_S if has else None)
