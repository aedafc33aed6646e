"""Two processes without a training in them, for what the launcher does: `light_job.py MODE FOLDER`.

`serve`: work until asked to stop, then return 143. `deaf`: never stop. `die`: process 1 kills itself while process 0
waits for it.
Each process writes its number as NAME into FOLDER once it is at work.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hdm_lightning.cli.command import run_command
from hdm_lightning.training import world
from hdm_lightning.training.launch import launch
from hdm_lightning.training.stop_request import STOP


def serve(config):
    """Set the flag's answer: 143 once the signal came."""
    with STOP.listening():
        Path(config["folder"], os.environ["RANK"]).write_text(str(os.getpid()))
        while not STOP.is_pending:
            time.sleep(0.02)
    return 143


def deaf(config):
    """Hear the signal, say so, and work on."""
    with STOP.listening():
        Path(config["folder"], os.environ["RANK"]).write_text(str(os.getpid()))
        while not STOP.is_pending:
            time.sleep(0.02)
        Path(config["folder"], f"heard{os.environ['RANK']}").touch()
        time.sleep(600)
    return 0


def die(config):
    """One process dies, the other waits in a collective, its ears shut as in a run."""
    world.join_group("cpu")
    Path(config["folder"], os.environ["RANK"]).write_text(str(os.getpid()))
    with STOP.listening():
        dist.barrier()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
        time.sleep(600)
    return 0


if __name__ == "__main__":
    mode, folder = sys.argv[1:]
    sys.exit(run_command(lambda: launch({"serve": serve, "deaf": deaf, "die": die}[mode], {"folder": folder}, 2)))
