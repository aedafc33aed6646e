"""Modulation under reduced precision: computed in at least float32, its results rounded once."""

import pytest
import torch

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.conditioning import Modulation

CONFIG = XUTConfig(
    width=64, mlp_width=96, heads=2, head_dim=32, context_width=12, depth=4, decoder_blocks=2, residual="normed"
)


def filled(modulation_rms: float = 0.02) -> XUT:
    """A network in which every part does its work; the modulation departs from one by a few per cent."""
    torch.manual_seed(0)
    model = XUT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for layer in model.modulation.children():
            layer.output.weight.mul_(modulation_rms)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gain_shift_and_gate_keep_float32_under_autocast_and_in_a_half_network(dtype):
    model, condition = filled().modulation, torch.randn(3, 64).to(dtype)
    expected = model.double()(condition.double())
    with torch.autocast("cpu", dtype):
        mixed = model.float()(condition)
    for found, exact in zip(mixed, expected, strict=True):
        for one, other in zip(found, exact, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-6)
    assert model.to(dtype)(condition).self_attention.gain.dtype == torch.float32
    assert model.double()(condition.double()).self_attention.gain.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_modulated_is_rounded_once(dtype):
    block = next(filled().blocks())
    tokens, mixed, normed = (torch.randn(2, 5, 64).to(dtype) for _ in range(3))
    gain, shift, gate = (1 + 0.003 * torch.randn(2, 1, 64) for _ in range(3))
    modulation, norm = Modulation(gain, shift, gate), block.self_attention_norm
    with torch.autocast("cpu", torch.bfloat16):
        added, scaled = block._add(tokens, normed, mixed, modulation), norm(tokens, modulation)
    assert added.dtype == scaled.dtype == dtype
    exact = (normed.double() + mixed.double() * gate.double()).to(dtype)
    torch.testing.assert_close(added, exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert (added != exact).float().mean() < 0.01  # float32 in between rounds a few ties otherwise
    unit = torch.nn.functional.rms_norm(tokens, (64,), eps=1e-6)
    exact = shift.double() + unit.double() * (norm.weight * gain).double()
    assert (scaled != exact.to(dtype)).float().mean() < (0.01 if dtype != torch.float32 else 0.3)
