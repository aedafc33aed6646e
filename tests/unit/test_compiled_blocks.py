"""Blocks compiled one by one: names, gradients and copies, and how many graphs a schedule makes."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from hdm_lightning.data.caption_lengths import padded_lengths
from hdm_lightning.models import XUTConfig
from hdm_lightning.models.compiled_blocks import uncompiled
from hdm_lightning.models.routing import random_keep
from hdm_lightning.training.averaging.averages import ParameterAverages
from hdm_lightning.training.modules.flow_step import is_compiled
from hdm_lightning.training.strategies.parallelize import prepare_network
from toy_run import shaken_network

CONFIG = XUTConfig(
    width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=2, decoder_blocks=2, blocks_after=1
)
ROUTED, WHOLE = 3, 2
"""Graphs of a stage: blocks outside the U where it is routed, blocks in it, blocks in it that read an encoder level."""


@pytest.fixture
def graphs(monkeypatch):
    """Counts what is compiled, and runs it in eager mode."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    counters.clear()
    yield counter
    assert not counters["graph_break"]
    torch.compiler.reset()


def filled_network(seed=0):
    return shaken_network(CONFIG, seed)


def velocity(network, batch=2, height=8, width=8, *, rate=0.5, text=5, masked=True):
    draw = torch.Generator().manual_seed(1)
    latent, context = torch.randn(batch, 4, height, width, generator=draw), torch.randn(batch, text, 16, generator=draw)
    lengths = torch.randint(1, text + 1, (batch,), generator=draw) if masked else None
    keep = random_keep(batch, height * width // 4, rate, draw) if rate else None
    return network(latent, torch.rand(batch, generator=draw), context, context_lengths=lengths, keep=keep)


def gradients(network):
    return torch.autograd.grad(velocity(network).square().sum(), list(network.parameters()))


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_a_compiled_network_keeps_names_and_gradients(monkeypatch, recompute):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain = filled_network()
    network = copy.deepcopy(plain)
    prepare_network(network, activation_checkpointing=recompute, compiled=True)
    assert list(network.state_dict()) == list(plain.state_dict())
    for found, expected in zip(gradients(network), gradients(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("recompute", "again"), [(False, 0), (True, 1), ("selective", 0)])
def test_a_compiled_block_runs_attention_again_where_it_was_not_kept(monkeypatch, recompute, again):
    computed = {"forward": 0, "backward": 0}

    def counting(direction):
        def count(graph, _inputs):
            for node in graph.graph.nodes:  # a repeated one is handed to an operator that sets the generator's state
                named = [str(node.target), *(str(each) for each in node.args if callable(each))]
                computed[direction] += any("scaled_dot" in name and "backward" not in name for name in named)
            return make_boxed_func(graph.forward)

        return count

    backend = aot_autograd(
        fw_compiler=counting("forward"),
        bw_compiler=counting("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    network = filled_network()
    prepare_network(network, activation_checkpointing=recompute, compiled=True)
    gradients(network)
    assert computed == {"forward": ROUTED + 1, "backward": again * (ROUTED + 1)}  # one of the graphs has two


def test_a_copy_of_a_compiled_network_computes_with_its_own_weights(graphs):
    network, other = filled_network(0), filled_network(1)
    prepare_network(network, compiled=True)
    copied = copy.deepcopy(network)
    copied.load_state_dict(other.state_dict())
    torch.testing.assert_close(velocity(copied), velocity(other), rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == ROUTED


def test_a_schedule_makes_no_more_graphs_than_shapes_and_kinds_of_block(graphs):
    """Two stages with buckets; validation of another batch size comes first, between and last."""
    network = filled_network()
    averages = ParameterAverages(network, [100])
    for rate, shapes, expected in (
        (0.5, [(8, 8), (4, 12), (12, 4)], 2 * ROUTED),
        (0.0, [(12, 12), (8, 16)], 2 * WHOLE),
    ):
        prepare_network(network, activation_checkpointing=not rate, compiled=True)
        before = graphs.frame_count
        for _ in range(2):
            _validate(network, averages)
            for shape in shapes:
                velocity(network, 2, *shape, rate=rate).square().sum().backward()
            assert graphs.frame_count == before + expected
        _validate(network, averages)
        assert graphs.frame_count == before + expected


def test_lengths_of_captions_make_a_graph_each_for_every_kind_of_block_and_the_full_context_one_more(graphs):
    network, lengths = filled_network(), padded_lengths([3, 5], 7, accelerated=True)
    prepare_network(network, compiled=True)
    for _ in range(2):
        for step in ([7, 5, 3, 3], [7, 7, 5, 3], [5, 5, 3, 3]):
            for number, text in enumerate(step):
                full = number == 0 and text == lengths[-1]
                velocity(network, text=text, masked=not full).square().sum().backward()
    assert graphs.frame_count == ROUTED * (len(lengths) + 1)


@torch.no_grad()
def _validate(network, averages):
    with uncompiled():
        raw, averaged = (velocity(each, 3, rate=0.0) for each in (network, averages.bound(0)))
    assert torch.equal(raw, averaged)


def test_ddp_does_not_cut_a_block_s_graph(graphs):
    """Although a block has several buckets of gradients."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = filled_network()
        prepare_network(network, compiled=True)
        parallel = DistributedDataParallel(network, bucket_cap_mb=0.01)
        for _ in range(2):
            velocity(parallel).square().sum().backward()
        assert graphs.frame_count == ROUTED
    finally:
        dist.destroy_process_group()


def test_a_network_that_holds_compiled_blocks_counts_as_compiled():
    inner = torch.nn.Module()
    holder = torch.nn.Sequential(inner)
    assert not is_compiled(holder) and not is_compiled(lambda *inputs: inputs[0])
    inner.has_compiled_blocks = True  # as `compile_blocks` leaves an XUT
    assert is_compiled(inner) and is_compiled(holder)
