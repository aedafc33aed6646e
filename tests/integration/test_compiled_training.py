"""A compiled training: one graph a kind of block and length, none for validation and pictures, and the same losses."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from composed import check_job, run_job
from hdm_lightning import FlowModule

BOTH = {"batch_size": 8, "learning_rate": 1.0, "warmup_samples": 0}
STAGES = {
    "px24": {**BOTH, "resolution": 24, "samples": 32, "validate_every": 16, "sample_every": 32},
    "px32": {**BOTH, "resolution": 32, "samples": 16, "routing_rate": 0.0, "activation_checkpointing": True},
}
GRAPHS = {"px24": 3, "px32": 2}
"""Of a length of image and caption together: blocks outside the U, where it is routed; blocks in it; and
the one in it that reads an encoder level."""


@pytest.fixture
def losses(tmp_path, toy_job, changed):
    """Function of whether to compile that trains two stages with buckets and gives their validation losses."""

    def trained(compiled):
        config = changed(
            toy_job(tmp_path / f"compiled_{compiled}", **STAGES),
            data={"crop": {"buckets": {"step_px": 8}}, "text_lengths": [4], "captions": {"drop": 0.5}},
            hardware={"compile": compiled},
            callbacks={
                "weight_averages": {"halflife_samples": []},
                "sample_images": {"prompts": ["red circle"], "steps": 2},
            },
        )
        assert run_job(check_job(config)) == 0
        done = sorted(Path(config["run_dir"]).glob("*/done.json"))
        return [json.loads(path.read_text())["validation"]["raw"] for path in done]

    return trained


def test_a_compiled_schedule_makes_a_graph_for_each_kind_of_block_and_length(monkeypatch, losses):
    graphs, lengths, original = CompileCounter(), {name: set() for name in STAGES}, FlowModule.training_step

    def note(self, batch, batch_idx):
        height, width = batch["image"].shape[-2:]
        lengths[self.stage].add((height * width // 16, batch["tokens"].shape[1]))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(FlowModule, "training_step", note)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    counters.clear()
    compiled = losses(True)
    assert all(len({length[part] for length in lengths["px32"]}) > 1 for part in (0, 1))
    sequences = {name: {image + text for image, text in found} for name, found in lengths.items()}
    assert graphs.frame_count == sum(GRAPHS[name] * len(found) for name, found in sequences.items())
    assert not counters["graph_break"]
    assert compiled == pytest.approx(losses(False), rel=1e-3)
    assert compiled[0] < 0.8  # about 1 before the training
