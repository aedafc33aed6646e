"""Toy runs in forked processes, and what they leave behind."""

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from composed import composed
from hdm_lightning.training.callbacks.weight_averages import averages_state
from hdm_lightning.training.checkpoint_io import checkpoints_in, network_weights, read_checkpoint
from toy_run import run_config


@dataclass
class Toy:
    """A configuration, its folder, and what a run of it has left there."""

    config: dict
    folder: Path

    def stage_folder(self, number):
        """Folder of a stage by its number."""
        return next(self.folder.glob(f"{number:02d}-*"))

    def checkpoints(self, number=1):
        """Names of a stage's checkpoints."""
        return [path.name for path in checkpoints_in(self.stage_folder(number) / "checkpoints")]

    def end(self, number=1):
        """Weights and averages of a stage's last checkpoint, as one mapping of tensors."""
        checkpoint = read_checkpoint(checkpoints_in(self.stage_folder(number) / "checkpoints")[-1])
        averages = averages_state(checkpoint)["shadows"]
        named = {f"{which}.{name}": value for which, shadow in enumerate(averages) for name, value in shadow.items()}
        return network_weights(checkpoint) | named

    def rewinds(self, number=1):
        """The lines of a stage's rewinds.jsonl."""
        path = self.stage_folder(number) / "rewinds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def toy(tmp_path, tiny_text_encoder, tiny_autoencoder, tiny_shards):
    """Makes toy configurations with stages of one's own."""

    def make(name="run", stages=None, **changes):
        folder = tmp_path / name
        own = {"micro_batch_size": 2, "learning_rate": 0.1}
        named = {key: {**own, **stage} for key, stage in (stages or {"px16": {}}).items()}
        usual = {
            "validation": {"samples": 8, "batch_size": 2},
            "callbacks": {"progress": None, "weight_averages": {"halflife_samples": [16]}},
        }
        parts = (tiny_text_encoder, tiny_autoencoder, tiny_shards)
        config = run_config(folder, *parts, named, **{**usual, **changes})
        return Toy(config, folder)

    return make


class Server:
    """Client of `fork_server.py`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        script = Path(__file__).with_name("fork_server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, toy: Toy, ranks: int = 1, **faults) -> list[int]:
        """Run a toy on so many ranks with faults (see `faults.py`); returns the ranks' exit statuses."""
        self.log.write_text("")
        order = {
            "config": OmegaConf.to_yaml(composed(toy.config)),
            "ranks": ranks,
            "faults": faults,
            "log": str(self.log),
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the server."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A process that forks runs; `server.log` holds what the last run printed."""
    client = Server(tmp_path_factory.mktemp("server") / "log.txt")
    yield client
    client.close()


@pytest.fixture
def trained_positions():
    """Reads what `faults.note_positions` wrote into folders, one an attempt, in the order of the attempts."""

    def read(folders):
        latest = {}
        for attempt, folder in enumerate(folders):
            for path in Path(folder).glob("rank*.jsonl"):
                for line in map(json.loads, path.read_text().splitlines()):
                    place, time = (line["stage"], line["step"]), (attempt, line["fit"])
                    if time > latest.get(place, ((-1, -1), []))[0]:
                        latest[place] = (time, [])
                    if time == latest[place][0]:
                        latest[place][1].extend(line["positions"])
        steps = defaultdict(dict)
        for (stage, step), (_, positions) in latest.items():
            steps[stage][step] = sorted(positions)
        return dict(steps)

    return read


@pytest.fixture
def same():
    """Whether two mappings of tensors are equal bit for bit."""

    def compare(first, second):
        return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    return compare
