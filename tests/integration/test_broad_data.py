"""experiments/broad_data as a whole at toy size, its web set imitated: the commands of docs/tutorials/web_sets.md."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.broad_data import run


@pytest.mark.slow
def test_from_a_web_set_to_a_model_over_http_on_two_processes_killed_twice(tmp_path):
    toy = ["--rows", "200", "--more", "50", "--per-shard", "50", "--second-stage", "128", "--vae-samples", "64"]
    out = tmp_path / "result.json"
    run.main([*toy, "--kills", "0.2", "0.7", "--img2dataset", "", "--work", str(tmp_path / "work"), "--out", str(out)])
    result = json.loads(out.read_text())
    counted = result["counted"]["found"]["numbers"]
    samples = [each["samples"] for each in result["prepared"]["found"]]
    assert samples[1] == counted["good"]
    assert samples[-2:] == [counted["kept"]["by_scores"], counted["kept"]["by_both"]]
    assert set(result["compared"].values()) == {True}
    for name, kills in (("whole", 0), ("killed", 2)):
        found = result[name]["found"]
        assert len(found["killed_at"]) == kills
        assert {(each["without_a_gap"], each["bad"]) for each in found["stages"].values()} == {(True, 0)}
