"""Learning-rate rules: every parameter once, at the rate and decay that its kind calls for."""

import pytest
import torch
from torch import nn

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.training.optimization.learning_rates import RULES, parameter_groups

BASE, DECAY = 0.5, 0.02


def network(**changes: object) -> XUT:
    with torch.device("meta"):
        return XUT(XUTConfig.preset("xut_base", **changes))


def settings_by_name(groups: list) -> dict[str, tuple[float, float]]:
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


@pytest.mark.parametrize("rule", RULES)
def test_every_parameter_is_in_exactly_one_group(rule: str) -> None:
    model = network()
    groups = parameter_groups(model, BASE, DECAY, rule=rule)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters()}
    by_name = dict(model.named_parameters())
    for group in groups:
        assert [id(by_name[name]) for name in group["names"]] == [id(p) for p in group["params"]]


@pytest.mark.parametrize(("rule", "most"), [("mup", 9), ("published", 7), ("constant", 2)])
def test_groups_are_merged_by_rate_and_decay(rule: str, most: int) -> None:
    groups = parameter_groups(network(), BASE, DECAY, rule=rule)
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == len(groups) == most


@pytest.mark.parametrize(
    ("name", "divisor", "decayed"),
    [
        ("patch_embedding.weight", 4 * 2 * 2, True),
        ("patch_embedding.bias", 1024, False),
        ("text_projection.weight", 1024, True),
        ("time_embedding.projection.weight", 1024, True),
        ("aspect_embedding.input.weight", 1024, False),
        ("aspect_embedding.input.bias", 1024, False),
        ("aspect_embedding.output.weight", 1024, True),
        ("modulation.cross_attention.norm.weight", 1024, False),
        ("modulation.cross_attention.hidden.weight", 1024, True),
        ("modulation.cross_attention.output.weight", 4096, True),
        ("modulation.cross_attention.output.bias", 3072, False),
        ("encoder.0.0.self_attention_norm.weight", 1024, False),
        ("encoder.0.0.self_attention.qkv.weight", 1024, True),
        ("decoder.3.0.cross_attention.log_frequencies", 1024, False),
        ("decoder.3.0.cross_attention.key_value.weight", 1024, True),
        ("blocks_after.2.feed_forward.input.weight", 1024, True),
        ("blocks_after.2.feed_forward.input.bias", 6144, False),
        ("blocks_after.2.feed_forward.output.weight", 3072, True),
        ("output_projection.weight", 1024, True),
    ],
)
def test_mup_rates_and_decay(name: str, divisor: int, decayed: bool) -> None:
    found = settings_by_name(parameter_groups(network(), BASE, DECAY))[name]
    assert found == (BASE / divisor, DECAY if decayed else 0.0)


def test_the_published_rule_is_literal_and_decays_everything() -> None:
    found = settings_by_name(parameter_groups(network(), BASE, DECAY, rule="published"))
    assert found["aspect_embedding.input.weight"] == (0.5, DECAY)
    assert found["encoder.0.0.self_attention.log_frequencies"] == (0.5 / 32, DECAY)
    assert found["encoder.0.0.self_attention_norm.weight"] == (0.5 / 1024, DECAY)
    assert {decay for _, decay in found.values()} == {DECAY}


def test_the_constant_rule_decays_matrices_only() -> None:
    model = network()
    found = settings_by_name(parameter_groups(model, 1e-3, DECAY, rule="constant"))
    for name, parameter in model.named_parameters():
        decayed = parameter.dim() > 1 and not name.endswith("log_frequencies")
        assert found[name] == (1e-3, DECAY if decayed else 0.0)


def test_the_constant_rule_takes_any_module() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    found = settings_by_name(parameter_groups(module, 1e-4, 0.1, rule="constant"))
    assert found == {"0.weight": (1e-4, 0.1), "0.bias": (1e-4, 0), "1.weight": (1e-4, 0), "1.bias": (1e-4, 0)}


def test_an_uncovered_parameter_is_an_error() -> None:
    model = network()
    model.register_parameter("register_tokens", nn.Parameter(torch.zeros(4, 1024)))
    with pytest.raises(ValueError, match=r"no row of the .* rule 'mup' covers parameter 'register_tokens'"):
        parameter_groups(model, BASE, DECAY)


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model.text_projection.requires_grad_(False)
    names = settings_by_name(parameter_groups(model, BASE, DECAY))
    assert "text_projection.weight" not in names
    assert "patch_embedding.weight" in names


def test_wrong_rules_and_modules_are_named() -> None:
    with pytest.raises(ValueError, match="rule is 'sgd'; expected one of mup, published, constant"):
        parameter_groups(network(), BASE, DECAY, rule="sgd")
    with pytest.raises(ValueError, match="module is a Linear; the rule 'mup' needs an XUT"):
        parameter_groups(nn.Linear(2, 2), BASE, DECAY)


def test_torch_takes_the_groups_and_saves_them_as_plain_values() -> None:
    torch.manual_seed(0)
    model = XUT(XUTConfig(width=16, mlp_width=8, heads=1, head_dim=16, context_width=8, depth=1, decoder_blocks=1))
    optimizer = torch.optim.AdamW(parameter_groups(model, BASE, DECAY), betas=(0.9, 0.98))
    before = model.output_projection.bias.clone()
    model(torch.randn(2, 4, 4, 4), torch.rand(2), torch.randn(2, 3, 8)).sub(1).square().mean().backward()
    optimizer.step()
    moved = (model.output_projection.bias - before).abs()
    assert torch.allclose(moved, torch.full_like(moved, BASE / 16), rtol=1e-3)
    assert all(isinstance(name, str) for group in optimizer.state_dict()["param_groups"] for name in group["names"])
