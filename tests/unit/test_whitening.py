"""Whitening of text states against closed forms."""

import pytest
import torch
from torch import nn

from hdm_lightning.encoders.text_whitening import RIDGE, TextWhitening, WhitenedTextEncoder


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator) * torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1, 0.02])
    return torch.randn(400, 6, generator=generator) @ mixing.T + 3.0


def test_mean_and_covariance_are_what_the_formula_says(rows):
    white = TextWhitening.measure(rows).apply(rows).double()
    variances = torch.linalg.eigvalsh(torch.cov(rows.double().T))
    expected = variances / (variances + RIDGE * variances.max())  # of each direction; all below 1
    assert white.mean(0).abs().max() < 1e-5
    assert torch.allclose(torch.linalg.eigvalsh(torch.cov(white.T)), expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_it_is_exact_under_autocast_and_never_below_the_states_precision(rows, dtype, error):
    whitening, states = TextWhitening.measure(rows), rows.to(dtype)
    exact = (states.double() - whitening.mean) @ whitening.matrix
    with torch.autocast("cpu", torch.bfloat16):
        white = whitening.apply(states)
    assert white.dtype == dtype
    torch.testing.assert_close(white.double(), exact, rtol=0, atol=error)


def test_without_a_ridge_every_direction_has_variance_one(rows):
    white = TextWhitening.measure(rows, ridge=0.0).apply(rows).double()
    assert torch.allclose(torch.cov(white.T), torch.eye(6, dtype=torch.float64), atol=1e-3)


def test_a_folded_layer_does_on_plain_states_what_the_layer_does_on_white_ones(rows):
    whitening, layer = TextWhitening.measure(rows), nn.Linear(6, 5)
    weight, bias = whitening.fold(layer.weight.detach(), layer.bias.detach())
    white = layer(whitening.apply(rows))
    assert torch.allclose(rows @ weight.T + bias, white, atol=1e-5)
    back = whitening.unfold(weight, bias)
    assert torch.allclose(back[0], layer.weight, atol=1e-5) and torch.allclose(back[1], layer.bias, atol=1e-5)


def test_it_survives_its_file(tmp_path, rows):
    whitening = TextWhitening.measure(rows)
    (tmp_path / "w.safetensors").write_bytes(whitening.to_bytes())
    read = TextWhitening.load(tmp_path / "w.safetensors")
    assert torch.equal(read.mean, whitening.mean) and torch.equal(read.matrix, whitening.matrix)


class Table:
    width = 6

    def __init__(self, states):
        self.states = states

    def encode(self, tokens, lengths):
        real = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        return self.states[tokens] * real.unsqueeze(-1)


def test_padding_stays_zero_and_the_rest_is_white(rows):
    whitening = TextWhitening.measure(rows)
    tokens, lengths = torch.tensor([[3, 4, 0], [7, 0, 0]]), torch.tensor([2, 1])
    states = WhitenedTextEncoder(Table(rows), whitening).encode(tokens, lengths)
    assert torch.equal(states[0, :2], whitening.apply(rows[[3, 4]]))
    assert states[0, 2].abs().sum() == 0 and states[1, 1:].abs().sum() == 0


def test_what_cannot_be_measured_is_refused(rows):
    for bad in (rows[:1], rows[0], torch.ones(10, 6)):
        with pytest.raises(ValueError, match="rows"):
            TextWhitening.measure(bad)
    with pytest.raises(ValueError, match="whitening"):
        WhitenedTextEncoder(Table(rows), TextWhitening.measure(rows[:, :4]))
