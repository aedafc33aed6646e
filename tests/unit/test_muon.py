"""Muon against the polynomial on singular values, against torch's own Muon, and AdamW's part against torch's."""

import copy

import pytest
import torch

from hdm_lightning.models import XUTConfig
from hdm_lightning.training.optimization.learning_rates import parameter_groups, warmup_cosine
from hdm_lightning.training.optimization.moments import carry_moments
from hdm_lightning.training.optimization.muon import (
    COEFFICIENTS,
    MuonAdamW,
    muon_groups,
    orthogonalised,
    packed_matrices,
)
from toy_run import shaken_network

CONFIG = XUTConfig(width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=1, blocks_after=1)


def optimizer_of(network, name, rate=0.5, decay=0.01):
    kind = {"adamw": torch.optim.AdamW, "muon": MuonAdamW}[name]
    return kind([*parameter_groups(network, rate, decay, rule="mup")], betas=(0.9, 0.98), fused=True)


def schedule_of(optimizer):
    return warmup_cosine(optimizer, samples=800, samples_per_step=8)


@pytest.fixture
def network():
    return shaken_network(CONFIG, by=0.02)


def gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 16, 8), (2, 8, 20)])
def test_newton_schulz_is_the_quintic_on_the_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(orthogonalised(matrices).double(), u @ torch.diag_embed(s) @ v, atol=2e-5)
    assert s.max() < 1.2


def test_a_step_equals_torch_s_muon_on_each_packed_matrix():
    torch.manual_seed(0)
    packed = torch.nn.Parameter(torch.randn(48, 16))
    single = [torch.nn.Parameter(part.clone()) for part in packed.detach().chunk(3)]
    name = "encoder.0.0.self_attention.qkv.weight"
    own = MuonAdamW([{"params": [packed], "names": [name], "lr": 0.01, "weight_decay": 0.1}])
    reference = torch.optim.Muon(single, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = packed.detach().clone()
    for step in range(3):
        packed.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(step))
        for part, gradient in zip(single, packed.grad.chunk(3), strict=True):
            part.grad = gradient.clone()
        own.step()
        reference.step()
    moved, expected = packed.detach() - start, torch.cat([part.detach() for part in single]) - start
    assert (moved - expected).norm() < 0.02 * expected.norm()  # torch rounds to bfloat16


def test_a_step_s_root_mean_square_is_a_fifth_of_the_rate():
    parameter = torch.nn.Parameter(torch.zeros(64, 32))
    name = "encoder.0.0.self_attention.output.weight"
    optimizer = MuonAdamW([{"params": [parameter], "names": [name], "lr": 0.1, "weight_decay": 0.0}])
    parameter.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert parameter.detach().square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.15)


def test_the_rest_is_trained_as_by_adamw(network):
    other = copy.deepcopy(network)
    muon = optimizer_of(network, "muon")
    adamw = optimizer_of(other, "adamw")
    for step in range(4):
        gradients(network, step)
        gradients(other, step)
        muon.step()
        adamw.step()
    moved = dict(network.named_parameters())
    for name, expected in other.named_parameters():
        assert torch.equal(moved[name], expected) == (packed_matrices(name) == 0), name


def test_muon_trains_every_matrix_of_the_blocks_and_nothing_else(network):
    groups = muon_groups(parameter_groups(network, 0.5, 0.02))
    names = {name: group["parts"] for group in groups for name in group["names"]}
    assert names.keys() == dict(network.named_parameters()).keys()
    for name, parameter in network.named_parameters():
        inside = any(part in name for part in ("blocks_before", "encoder.", "decoder.", "blocks_after"))
        matrix = inside and parameter.ndim == 2
        assert (names[name] > 0) == matrix, name
        if matrix:
            rows, width = parameter.shape
            kinds = {"qkv": rows // width, "key_value": rows // width, "feed_forward.input": 2}
            assert names[name] == next((parts for kind, parts in kinds.items() if kind in name), 1), name


def test_the_parts_of_a_group_are_taken_before_its_names():
    """So the matrices of another network can be trained too, and groups that are split already stay so."""
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    given = [{"params": [parameter], "names": ["my.matrix"], "parts": 2, "lr": 0.1, "weight_decay": 0.0}]
    assert muon_groups(given) == muon_groups(muon_groups(given)) == given


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_saved_and_loaded_it_goes_on_bit_for_bit(network, name):
    whole = optimizer_of(network, name)
    schedule = schedule_of(whole)
    for step in range(3):
        gradients(network, step)
        whole.step()
        schedule.step()
    copied = copy.deepcopy(network)
    resumed = optimizer_of(copied, name)
    again = schedule_of(resumed)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    again.load_state_dict(schedule.state_dict())
    for step in range(3, 6):
        for each, optimizer, rates in ((network, whole, schedule), (copied, resumed, again)):
            gradients(each, step)
            optimizer.step()
            rates.step()
    for one, two in zip(network.parameters(), copied.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_carried_into_groups_that_are_cut_otherwise(network, name):
    old = optimizer_of(network, name)
    gradients(network, 0)
    old.step()
    new = optimizer_of(network, name, rate=0.1, decay=0.0)  # decayed and undecayed ones of one rate share a group
    assert len(new.param_groups) < len(old.param_groups)
    rates = [group["lr"] for group in new.param_groups]
    carry_moments({"optimizer_states": [old.state_dict()]}, new)
    assert [group["lr"] for group in new.param_groups] == rates
    for parameter in network.parameters():
        for key, value in old.state[parameter].items():
            assert torch.equal(torch.as_tensor(new.state[parameter][key]), torch.as_tensor(value))
