"""The recording of everything that needs a GPU, gone through at tiny sizes on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECORD = Path(__file__).parents[2] / "experiments" / "gpu_record" / "record.py"


@pytest.mark.slow
def test_every_part_but_the_long_training_runs_on_a_cpu(tmp_path):
    parts = ["tests", "network", "step", "prepare", "train", "sample", "profile"]
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    command = [sys.executable, str(RECORD), *parts, "--tiny", "--limit", "900", *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [row["part"] for row in record["parts"]] == parts
    train = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (train["stopped_with"], train["resumed_with"]) == (143, 0)
    first, second, resumed = train["fits"]
    assert (first["stage"], first["steps"]) == ("px256", 12)
    assert resumed["stage"] == second["stage"] == "px512" and resumed["from_step"] == second["steps"]
    assert resumed["from_step"] + resumed["steps"] == 12
    assert json.loads((tmp_path / "out" / "step.json").read_text())
    assert list((tmp_path / "out" / "samples").glob("*.png"))


def test_a_part_that_has_no_time_left_is_noted_and_unknown_ones_are_named(tmp_path):
    command = [sys.executable, str(RECORD), "--tiny", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    none_left = subprocess.run([*command, "step", "--limit", "1"], capture_output=True, text=True, check=False)
    assert none_left.returncode == 1
    record = json.loads((tmp_path / "record.json").read_text())
    assert [(row["part"], row["status"]) for row in record["parts"]] == [("step", "no time left")]
    unknown = subprocess.run([*command, "stepp"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2 and "stepp" in unknown.stderr and "network_1024" in unknown.stderr
