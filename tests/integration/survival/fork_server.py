"""Runs the processes of toy trainings as forks of one process that has everything imported already.

A start of the real command costs seconds of imports; a fork costs milliseconds, so that dozens of kills fit into a
test. The server reads a JSON object a line from stdin (see `Server.run` in conftest.py) and answers with one.
Like the launcher, it ends all processes of a run when one of them has failed.
"""

import json
import os
import signal
import sys
import time

import faults
from omegaconf import OmegaConf

from hdm_lightning.one_machine import meeting_place
from hdm_lightning.training.composition import build
from hdm_lightning.training.flow_run import OF_THE_ENCODER, OF_THE_VAE
from hdm_lightning.training.launch import read_failures, start_worker
from hdm_lightning.training.schedule import run_schedule

GRACE_S = 20.0


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    warm = False
    for line in sys.stdin:
        order = json.loads(line)
        if not warm:
            import torch.utils.tensorboard  # noqa: F401 (Lightning imports it in every run)

            config = OmegaConf.create(order["config"])
            build(config, "text_encoder", own=OF_THE_ENCODER)
            build(config, "vae", own=OF_THE_VAE)
            warm = True
        answers.write(json.dumps(run(order)) + "\n")
        answers.flush()


def run(order: dict) -> list[int]:
    """Fork the ranks of one run and wait for all; returns their exit statuses, minus the signal for a killed one."""
    pids: list[int] = []
    with meeting_place() as place:
        for rank in range(order["ranks"]):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, pids[0] if pids else 0)
                child(order, rank, str(place / "group"))
            pids.append(pid)
            os.setpgid(pid, pids[0])  # here as well, since either process may be the first to get there
        statuses = wait_for(pids)
        with open(order["log"], "a") as log:
            log.writelines(failure.text for failure in read_failures(place)[:1])
        return statuses


def wait_for(pids: list[int]) -> list[int]:
    """Exit statuses of the processes; when one fails the others are ended as the launcher would."""
    statuses: dict[int, int] = {}
    failed_at: float | None = None
    while len(statuses) < len(pids):
        for pid in set(pids) - set(statuses):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if failed_at is None and any(statuses.values()):
            failed_at = time.monotonic()
            end(set(pids) - set(statuses), signal.SIGTERM)
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            end(set(pids) - set(statuses), signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def end(pids: set[int], number: int) -> None:
    """Send a signal to processes that have not been waited for yet."""
    for pid in pids:
        os.kill(pid, number)


def child(order: dict, rank: int, meeting: str) -> None:
    """One rank, as the launcher would start it; does not return."""
    status = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        ranks = order["ranks"]
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0")
        os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        faults.install(order["faults"], rank)
        status = start_worker(meeting, run_schedule, {"config": order["config"]})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
