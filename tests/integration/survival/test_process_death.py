"""Signals to the command and to single processes, and processes that die: who stops, saves, and says what."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdm_lightning.training.launch import launch

LIGHT = Path(__file__).with_name("light_job.py")
PATIENCE_S = 300  # for starts on a busy machine; what is measured is far shorter


def start(mode, folder):
    folder.mkdir()
    line = [sys.executable, str(LIGHT), mode, str(folder)]
    job = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + PATIENCE_S
    while not all((folder / rank).exists() and (folder / rank).read_text() for rank in "01"):
        assert time.monotonic() < deadline and job.poll() is None, job.stderr.read()
        time.sleep(0.05)
    return job, [int((folder / rank).read_text()) for rank in "01"]


def test_signals_to_the_command_reach_its_processes_and_a_death_is_told(tmp_path):
    """Both signals and a death at once: starting processes is what takes the time."""
    asked, killed = start("serve", tmp_path / "asked"), start("die", tmp_path / "killed")
    asked[0].send_signal(signal.SIGTERM)
    assert asked[0].wait(PATIENCE_S) == 143
    begin = time.monotonic()
    assert killed[0].wait(60) == 2
    assert time.monotonic() - begin < 60
    told = killed[0].stderr.read()
    assert "process 1 of the run was killed by SIGKILL" in told and "the others were stopped" in told
    assert "Traceback" not in told
    assert not any(Path(f"/proc/{pid}").exists() for pid in [*asked[1], *killed[1]])


def test_ctrl_c_is_heard_once_by_every_process_and_a_second_one_ends_them(tmp_path):
    """As a terminal sends it: to all processes of the command."""
    served, deaf = start("serve", tmp_path / "served"), start("deaf", tmp_path / "deaf")
    for job, _ in (served, deaf):
        os.killpg(job.pid, signal.SIGINT)
    assert served[0].wait(PATIENCE_S) == 130
    deadline = time.monotonic() + PATIENCE_S
    while not all((tmp_path / "deaf" / f"heard{rank}").exists() for rank in "01"):
        assert time.monotonic() < deadline and deaf[0].poll() is None
        time.sleep(0.05)
    os.killpg(deaf[0].pid, signal.SIGINT)
    assert deaf[0].wait(30) == 130
    for job, workers in (served, deaf):
        told = job.stderr.read()
        assert "Traceback" not in told and "Ctrl-C again ends at once" in told
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_one_process_and_processes_started_from_outside_run_right_here(monkeypatch):
    def worker(config):
        return config["status"]

    assert launch(worker, {"status": 7}, 1) == 7
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launch(worker, {"status": 8}, 2) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "statuses"), [("term", [143, 143]), ("term all", [143, 143]), ("kill", None), ("kill all", [-9, -9])]
)
def test_a_run_stopped_in_any_way_goes_on_to_the_same_end(toy, server, same, how, statuses, request):
    whole = request.getfixturevalue("whole_on_two")
    stopped = toy(how.replace(" ", "-"))
    die = {"at": "forward", "nth": 6, "how": how, "on": 1}  # the second micro-batch of step 3; step 2 is saved
    got = server.run(stopped, 2, die=die)
    assert got == statuses if statuses else got[1] == -9 and got[0] != 0
    assert stopped.checkpoints()[-1] == ("step-00000003.ckpt" if "term" in how else "step-00000002.ckpt")
    assert server.run(stopped, 2) == [0, 0]
    assert same(whole.end(), stopped.end())


@pytest.fixture
def whole_on_two(toy, server):
    """An uninterrupted run on two processes."""
    whole = toy("whole")
    assert server.run(whole, 2) == [0, 0]
    return whole


def test_the_first_process_alone_says_when_a_checkpoint_is_overdue(toy, server):
    """The other one's clock never says so: without agreement the processes would wait for each other for ever."""
    callbacks = {"progress": None, "checkpoint": {"keep": 9, "every_minutes": 1e-9}}
    run = toy("minutes", {"px16": {"samples": 24, "save_every": 0}}, callbacks=callbacks)
    assert server.run(run, 2, never_overdue={"on": 1}) == [0, 0]
    assert run.checkpoints() == [f"step-{step:08d}.ckpt" for step in (1, 2, 3)]


def test_no_scalar_before_the_checkpoint_is_lost(toy, server):
    """Killed once the checkpoint of step 2 is in place; what comes after it is logged again."""
    stages = {"px16": {"samples": 48, "save_every": 16, "validate_every": 8}}
    whole, killed = toy("whole", stages), toy("killed", stages)
    assert server.run(whole) == [0]
    assert server.run(killed, die={"at": "in place", "nth": 1, "how": "kill", "on": 0}) == [-9]
    assert server.run(killed) == [0]
    for tag in ("train/loss_mean", "val/loss"):
        assert logged(killed, tag) == logged(whole, tag)
    assert [step for step, _ in logged(whole, "val/loss")] == [0, 8, 16, 24, 32, 40, 48]


def logged(toy, tag):
    events = EventAccumulator(str(toy.stage_folder(1) / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def command(toy, folder, *, torchrun=False):
    """The command line that trains a toy, its configuration as an experiment in `folder`."""
    (folder / "experiment").mkdir(parents=True, exist_ok=True)
    groups = {"vae": "folder", "trainer": "cpu", "schedule": None}
    callbacks = {"sample_images": {"prompts": []}, **toy.config["callbacks"]}
    defaults = [{f"override /{group}": name} for group, name in groups.items()]
    config = {"defaults": defaults, **toy.config, "callbacks": callbacks}
    (folder / "experiment" / "toy.yaml").write_text("# @package _global_\n" + yaml.safe_dump(config, sort_keys=False))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    return [sys.executable, *start, "-m", "hdm_lightning.cli.train", "--config-dir", str(folder), "experiment=toy"]


@pytest.mark.slow
def test_torchrun_from_outside(toy, tmp_path, whole_on_two, same):
    """Two processes started by torchrun end as the launcher's own two do."""
    ours = toy("outside")
    line = command(ours, tmp_path / "conf", torchrun=True)
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert (ours.folder / "final" / "model_index.json").exists()
    assert same(whole_on_two.end(), ours.end())


def interrupt(line, folder, ours, number, after_step, pause):
    """Start the command, send it a signal some time after it has saved a step; returns its exit status."""

    def saved():
        return {path.name for path in ours.folder.glob("*/checkpoints/step-*.ckpt")}

    before = saved()
    job = subprocess.Popen(line, cwd=folder, start_new_session=True)
    deadline = time.monotonic() + PATIENCE_S
    while not any(name >= f"step-{after_step:08d}" for name in saved() - before):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.005)
    time.sleep(pause)
    if number == signal.SIGKILL:
        os.killpg(job.pid, number)
    else:
        job.send_signal(number)
    return job.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "seed"),
    [(signal.SIGTERM, 143, 0), (signal.SIGTERM, 143, 1), (signal.SIGUSR1, 143, 2), (signal.SIGKILL, -9, 3)],
)
def test_the_command_itself_is_killed_at_random_points_and_run_again(toy, server, tmp_path, number, status, seed, same):
    """The real command with two processes, twice: the signal goes to the parent alone (SIGKILL to its group)."""
    stages = {"px16": {"samples": 640}}  # long enough to be hit
    whole, ours = (
        toy("whole", stages),
        toy("command", stages, trainer={"accelerator": "cpu", "devices": 2, "log_every_n_steps": 2}),
    )
    assert server.run(whole, 2) == [0, 0]
    line, draw = command(ours, tmp_path / "conf"), random.Random(seed)
    for after_step in sorted(draw.sample(range(2, 41), 2)):  # of 80
        assert interrupt(line, tmp_path, ours, number, after_step, draw.uniform(0, 0.2)) == status
        assert not list(ours.folder.glob("*/done.json"))
    assert subprocess.run(line, cwd=tmp_path, timeout=PATIENCE_S).returncode == 0
    assert same(whole.end(), ours.end())
