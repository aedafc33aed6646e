"""Warm-up and cosine against the formula."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hdm_lightning.errors import UserError
from hdm_lightning.training.modules.resumable_module import call_optimizer
from hdm_lightning.training.optimization.learning_rates import rate_factor
from hdm_lightning.training.optimization.moments import carry_moments
from hdm_lightning.training.optimization.muon import MuonAdamW


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (0, 0.0),
        (50, 0.5),
        (100, 1.0),
        (550, 0.01 + 0.99 * 0.5),
        (1000, 0.01),
        (2000, 0.01),
        (325, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 4))),
    ],
)
def test_rate_factor(samples, expected):
    assert rate_factor(samples, total=1000, warmup=100, final_ratio=0.01) == pytest.approx(expected)


def test_no_warm_up_starts_at_the_full_rate():
    assert rate_factor(0, total=1000, warmup=0, final_ratio=0.1) == 1.0


def test_carried_moments_keep_the_new_stage_s_rates():
    layer = nn.Linear(2, 2)
    old = torch.optim.AdamW(layer.parameters(), lr=0.5, betas=(0.9, 0.98))
    layer(torch.ones(1, 2)).sum().backward()
    old.step()
    old.param_groups[0]["initial_lr"] = 0.5
    checkpoint = {"optimizer_states": [old.state_dict()]}
    new = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.9, 0.995), weight_decay=0.005)
    new.param_groups[0]["initial_lr"] = 0.1
    carry_moments(checkpoint, new)
    group = new.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["betas"], group["weight_decay"]) == (0.1, 0.1, (0.9, 0.995), 0.005)
    assert torch.equal(new.state[layer.weight]["exp_avg"], old.state[layer.weight]["exp_avg"])


def test_training_on_carried_moments_leaves_the_checkpoint_as_it_was():
    """A stage that goes back to its beginning takes them a second time."""
    layer = nn.Linear(2, 2)
    old = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 2)).sum().backward()
    old.step()
    checkpoint = {"optimizer_states": [old.state_dict()]}
    kept = copy.deepcopy(checkpoint["optimizer_states"][0]["state"])
    new = torch.optim.AdamW(layer.parameters(), fused=True)
    carry_moments(checkpoint, new)
    layer.weight.grad.fill_(float("nan"))
    new.step()
    for number, moments in checkpoint["optimizer_states"][0]["state"].items():
        assert all(torch.equal(value, kept[number][key]) for key, value in moments.items())


def test_carried_moments_of_a_class_of_tensors_that_cannot_be_cloned_are_copied():
    """As moments of 8 bits are."""

    class Pair(TwoTensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten.clone.default
            return super().__torch_dispatch__(func, types, args, kwargs or {})

    layer = nn.Linear(2, 2, bias=False)
    old, new = (torch.optim.AdamW(layer.parameters()) for _ in range(2))
    layer(torch.ones(1, 2)).sum().backward()
    old.step()
    checkpoint = {"optimizer_states": [old.state_dict()]}
    pair = Pair(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2))
    checkpoint["optimizer_states"][0]["state"][0]["exp_avg"] = pair
    carry_moments(checkpoint, new)
    taken = new.state[layer.weight]["exp_avg"]
    assert torch.equal(taken.a, pair.a) and taken.a.data_ptr() != pair.a.data_ptr()


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [
        (torch.optim.AdamW, {"eps": math.nan}, "epsilon"),
        (torch.optim.AdamW, {"betas": (2, 3)}, "beta"),
        (torch.optim.SGD, {"momentum": -1.0}, "momentum"),
        (MuonAdamW, {"momentum": 1.0}, "momentum is"),
        (MuonAdamW, {"momentum": -0.1}, "momentum is"),
        (MuonAdamW, {"rounds": 0}, "rounds is"),
    ],
)
def test_a_value_that_an_optimizer_refuses_is_the_user_s_mistake(kind, given, named):
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))], "lr": 0.1}]
    with pytest.raises(UserError, match=f"a setting was rejected: .*{named}") as caught:
        call_optimizer(partial(kind, **given), groups, fused=False)
    assert caught.value.where == "optimizer" and caught.value.hint
