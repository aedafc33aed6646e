"""A sharded network in one process: gathered precisions, averages in its place, tensors split and whole."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor

from hdm_lightning.models import XUTConfig
from hdm_lightning.training.averaging.averages import ParameterAverages
from hdm_lightning.training.optimization.learning_rates import parameter_groups
from hdm_lightning.training.strategies.parallelize import checkpoint_blocks, prepare_network, shard_network
from hdm_lightning.training.strategies.sharded_tensors import (
    is_sharded,
    load_optimizer,
    load_weights,
    total_norm,
    whole,
)
from toy_run import shaken_network

CONFIG = XUTConfig(width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=1, blocks_after=1)


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def filled_network(seed=0, config=CONFIG):
    """Weights and frequencies that bfloat16 cannot hold."""
    return shaken_network(config, seed)


def velocity(network):
    draw = torch.Generator().manual_seed(1)
    latent, context = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 16, generator=draw)
    return network(latent, torch.rand(2, generator=draw), context)


def in_bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def test_mixed_precision_is_that_of_autocast_to_the_last_bit(group):
    network = filled_network()
    sharded = copy.deepcopy(network)
    shard_network(sharded, "cpu", mixed=True)
    checkpoint_blocks(sharded, True)
    with in_bfloat16():
        expected, got = velocity(network), velocity(sharded)
    assert got.dtype == expected.dtype and torch.equal(got, expected)
    for each in (expected, got):
        each.float().square().mean().backward()
    gradients = [parameter.grad for parameter in sharded.parameters()]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(isinstance(gradient, DTensor) for gradient in gradients)
    reference = total_norm([parameter.grad for parameter in network.parameters()])
    assert float(total_norm(gradients)) == pytest.approx(float(reference), rel=1e-2)


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_of_a_kind_share_a_compiled_graph(group, monkeypatch, recompute):
    """Two kinds of blocks, those that read an encoder level and those that do not; gathering is not traced."""
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    network = filled_network(config=replace(CONFIG, depth=3, decoder_blocks=2))
    shard_network(network, "cpu", mixed=True)
    prepare_network(network, activation_checkpointing=recompute, compiled=True)
    for _ in range(2):
        with in_bfloat16():
            predicted = velocity(network)
        predicted.float().square().mean().backward()
    assert len(list(network.blocks())) == 11
    assert graphs.frame_count == 2


@pytest.mark.parametrize("sharded", [False, True])
def test_graphs_of_the_stage_before_do_not_count_towards_the_limit(group, monkeypatch, sharded):
    """Else a late stage would run uncompiled: a graph made anew shows that the former ones are gone."""
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    network = filled_network()
    if sharded:
        shard_network(network, "cpu", mixed=True)
    counts = []
    for _ in range(3):
        prepare_network(network, compiled=True)
        with in_bfloat16():
            velocity(network)
        counts.append(graphs.frame_count)
    assert counts[0] > 0 and counts == [counts[0], 2 * counts[0], 3 * counts[0]]


def test_averages_run_in_the_network_s_place_within_one_autocast(group):
    start, now = filled_network(0), filled_network(1)
    sharded = copy.deepcopy(start)
    shard_network(sharded, "cpu", mixed=True)
    averages = ParameterAverages(sharded, [100], ramp=0.0)
    load_weights(sharded, now.state_dict())
    with torch.no_grad(), in_bfloat16():
        wanted_raw, wanted_average = velocity(now), velocity(start)
    with torch.no_grad(), in_bfloat16():
        first, averaged, again = velocity(sharded), velocity(averages.bound(0)), velocity(sharded)
    assert not torch.equal(wanted_raw, wanted_average)
    assert torch.equal(averaged, wanted_average)
    assert torch.equal(first, wanted_raw) and torch.equal(again, wanted_raw)
    parameters = dict(sharded.named_parameters())
    with pytest.raises(ValueError, match="latent"):
        averages.bound(0)(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 5, 16))
    for name, value in now.named_parameters():
        assert torch.equal(whole(parameters[name]), value)
    for name, value in start.named_parameters():
        assert torch.equal(averages.state_dict()["shadows"][0][name], value)


def test_averages_of_split_and_whole_networks_are_the_same(group):
    network, later = filled_network(0), filled_network(1)
    sharded = copy.deepcopy(network)
    shard_network(sharded, "cpu", mixed=True)
    one, two = (ParameterAverages(each, [100], sigma_rel=[0.1]) for each in (network, sharded))
    for each in (network, sharded):
        load_weights(each, later.state_dict())
    for averages in (one, two):
        averages.update(64)
        averages.update(64)
    saved, expected = two.state_dict(), one.state_dict()
    assert all(torch.equal(saved["shadows"][1][name], value) for name, value in expected["shadows"][1].items())
    two.restart()
    assert torch.equal(whole(two.shadows[0])[0], next(later.parameters()))
    two.load_state_dict(expected)
    assert two.samples_seen == 128
    assert torch.equal(whole(two.shadows[0])[0], one.shadows[0][0])


def test_moments_go_into_a_split_optimizer_and_come_out_whole(group):
    network = filled_network()
    sharded = copy.deepcopy(network)
    shard_network(sharded, "cpu", mixed=True)
    assert is_sharded(sharded) and not is_sharded(network)
    plain, split = (
        torch.optim.AdamW([*parameter_groups(each, 0.5, 0.01, rule="mup")], betas=(0.9, 0.98), fused=True)
        for each in (network, sharded)
    )
    velocity(network).square().mean().backward()
    plain.step()
    load_optimizer(split, plain.state_dict())
    assert all(isinstance(state["exp_avg"], DTensor) for state in split.state.values())
    expected, got = plain.state_dict(), whole(split.state_dict())
    assert got["param_groups"] == expected["param_groups"]
    for number, state in expected["state"].items():
        assert all(torch.equal(got["state"][number][key], value) for key, value in state.items())
