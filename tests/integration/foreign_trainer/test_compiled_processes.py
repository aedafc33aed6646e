"""Graphs of a two-stage schedule on two processes: one a kind of block and length, none broken, none made again."""

from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import toy_run
from hdm_lightning import XUT
from hdm_lightning.models.routing import tokens_kept
from hdm_lightning.training.callbacks.weight_averages import WeightAverages
from hdm_lightning.training.strategies import own_strategies
from hdm_lightning.training.strategies.parallelize import prepare_network

CONFIG = replace(toy_run.CONFIG, decoder_blocks=2, blocks_after=1)
STAGES = {
    "routed": {"rate": 0.5, "recompute": False},
    "whole": {"rate": 0.0, "recompute": True},
    "selective": {"rate": 0.0, "recompute": "selective"},
}
COMPILE = torch.compile
STRATEGIES = {"ddp": DDPStrategy, "fsdp2": own_strategies.ShardedStrategy}


class NoteLengths(L.Callback):
    """Notes the tokens of image and of caption, and the losses."""

    def __init__(self):
        self.parts, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Those of a micro-batch."""
        height, width = batch["image"].shape[-2:]
        self.parts.append((height * width // pl_module.autoencoder.factor**2, batch["tokens"].shape[1]))
        self.losses.append(float(outputs["loss"]))


@pytest.fixture
def schedule(flow_module, shard_data, trainer):
    """Function that trains two stages with validations and averages; gives a note of each, and graphs after each."""

    def train(names, wrapping, compiled, processes):
        graphs, made, noted = CompileCounter(), [], []
        torch.compile = partial(COMPILE, backend=graphs)  # in this fork alone
        torch.manual_seed(0)
        network = XUT(CONFIG)
        for name in names:
            stage, note = STAGES[name], NoteLengths()
            prepare_network(network, activation_checkpointing=stage["recompute"], compiled=compiled)
            module = flow_module(network, routing_rate=stage["rate"], stage=name)
            shapes = {"resolution": 32, "crop": {"buckets": {"step_px": 8}}, "text_lengths": [4]}
            data = shard_data(2, stage=name, captions={"drop": 0.5}, validation_batch_size=3, **shapes)
            callbacks = [note, WeightAverages([16], ramp=0.0)]
            trainer(**{**processes, "strategy": wrapping(), "callbacks": callbacks, "max_steps": 4}).fit(module, data)
            made.append(graphs.frame_count)
            noted.append(note)
        return made, noted

    return train


def graphs_of(parts, rate):
    """One a length: of all blocks that do not read an encoder level, outside the U and in it, and of those that do."""
    full = {image + text for image, text in parts}
    inside = {tokens_kept(image, rate) + text for image, text in parts}
    return len(full | inside) + len(inside)


@pytest.mark.parametrize("names", [("routed", "whole"), pytest.param(("routed", "selective"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_kind_of_block_and_length_is_compiled_once_on_each_process(schedule, on_processes, strategy, names):
    """Without a break, and with the losses of a training that compiles nothing."""

    def both(**processes):
        counters.clear()
        made, compiled = schedule(names, STRATEGIES[strategy], True, processes)
        breaks = dict(counters["graph_break"])
        _, eager = schedule(names, STRATEGIES[strategy], False, processes)
        return made, breaks, [(note.parts, note.losses) for note in compiled], [note.losses for note in eager]

    for made, breaks, compiled, eager in on_processes(2, both):
        assert not breaks and len({text for parts, _ in compiled for _, text in parts}) > 1
        for number, (name, (parts, losses)) in enumerate(zip(names, compiled, strict=True)):
            assert len({image for image, _ in parts}) > 1
            assert made[number] - sum(made[number - 1 : number]) == graphs_of(parts, STAGES[name]["rate"])
            assert losses == pytest.approx(eager[number], rel=1e-3)
