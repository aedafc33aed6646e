"""Initial values by kind of tensor, and activations that do not depend on the width."""

import math

import pytest
import torch

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.initialization import log_frequencies


def network(width: int = 128, **changes: object) -> XUT:
    torch.manual_seed(0)
    fields = {"width": width, "mlp_width": 3 * width, "heads": width // 16, "head_dim": 16, "context_width": 48}
    return XUT(XUTConfig.from_json({**fields, "depth": 2, "decoder_blocks": 2, **changes}))


def test_every_parameter_has_the_value_of_its_kind() -> None:
    model = network()
    sublayers = sum(3 if block.reads_memory else 2 for block in model.blocks())
    zero = ("output_projection.weight", "aspect_embedding.output.weight", "modulation")
    seen = dict.fromkeys(("bias", "gain", "frequencies", "zero", "branch", "matrix"), 0)
    for name, value in model.named_parameters():
        if name.endswith(".bias"):
            kind, expected = "bias", torch.zeros_like(value)
            assert torch.equal(value, expected), name
        elif name.endswith("norm.weight"):
            kind = "gain"
            assert torch.equal(value, torch.ones_like(value)), name
        elif name.endswith("log_frequencies"):
            kind = "frequencies"
            assert torch.equal(value, log_frequencies(8, 16, "spread_5pi")), name
        elif name.startswith(zero) and not name.endswith("hidden.weight"):
            kind = "zero"
            assert torch.equal(value, torch.zeros_like(value)), name
        else:
            branch = name.endswith(("attention.output.weight", "feed_forward.output.weight"))
            kind = "branch" if branch else "matrix"
            expected_std = 1 / math.sqrt(value.shape[1] * (sublayers if branch else 1))
            assert value.std().item() == pytest.approx(expected_std, rel=0.15), name
        seen[kind] += 1
    assert all(seen.values()), seen


def test_the_first_velocity_is_zero_and_gradients_reach_the_output() -> None:
    model = network()
    velocity = model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 3, 48))
    assert torch.equal(velocity, torch.zeros_like(velocity))
    (velocity - 1).square().sum().backward()
    assert model.output_projection.weight.grad is not None
    assert model.output_projection.weight.grad.abs().sum() > 0


def block_scales(model: XUT) -> list[float]:
    scales: list[float] = []
    for block in model.blocks():
        block.register_forward_hook(lambda _m, _a, out: scales.append(out.square().mean().sqrt().item()))
    with torch.no_grad():
        model(torch.randn(4, 4, 8, 8), torch.rand(4), torch.randn(4, 6, 48))
    return scales


@pytest.mark.parametrize("residual", ["input", "normed"])
def test_activations_start_at_one_whatever_the_width(residual: str) -> None:
    for width in (32, 128, 512):
        scales = block_scales(network(width, residual=residual))
        assert min(scales) > 0.85, (width, scales)
        assert max(scales) < 1.3, (width, scales)


def test_frequencies_spread_over_heads_and_channels() -> None:
    spread = log_frequencies(heads=4, head_dim=32, rope_init="spread_5pi").exp()
    assert spread.shape == (4, 8, 2)
    assert spread.min().item() == pytest.approx(math.pi)
    assert spread.max().item() == pytest.approx(5 * math.pi)
    assert torch.equal(spread[..., 0], spread[..., 1])
    ratios = spread[..., 0].flatten().sort().values
    assert torch.allclose(ratios[1:] / ratios[:-1], torch.tensor(5 ** (1 / 31)), rtol=1e-5)
    assert (spread[:, 1:] > spread[:, :-1]).all()
    assert log_frequencies(4, 32, "spread_10pi").max().exp().item() == pytest.approx(10 * math.pi)
    assert torch.equal(log_frequencies(4, 32, "all_pi"), torch.full((4, 8, 2), math.log(math.pi)))


def test_the_seed_alone_decides() -> None:
    first, second = network().state_dict(), network().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
