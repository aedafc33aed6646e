"""Bad input is refused with a message that names the argument, what came and what was expected."""

import re
from typing import Any

import pytest
import torch

from hdm_lightning.models import PUBLISHED, XUT, XUTConfig

CONFIG = XUTConfig(width=16, mlp_width=8, heads=1, head_dim=16, context_width=12, depth=1, decoder_blocks=1)


@pytest.fixture(scope="module")
def model() -> XUT:
    return XUT(CONFIG)


def arguments(**changes: Any) -> dict[str, Any]:
    good = {"latent": torch.zeros(2, 4, 8, 6), "t": torch.full((2,), 0.5), "context": torch.zeros(2, 3, 12)}
    return good | changes


BAD = {
    "latent dimensions": ({"latent": torch.zeros(4, 8, 6)}, "latent", "(4, 8, 6)", "(B, 4, H, W)"),
    "latent channels": ({"latent": torch.zeros(2, 3, 8, 6)}, "latent", "(2, 3, 8, 6)", "(B, 4, H, W)"),
    "latent empty": ({"latent": torch.zeros(2, 4, 0, 6)}, "latent", "(2, 4, 0, 6)", "(B, 4, H, W)"),
    "latent patch": ({"latent": torch.zeros(2, 4, 8, 5)}, "latent", "8x5", "patch size 2"),
    "t shape": ({"t": torch.zeros(2, 1)}, "t", "(2, 1)", "(2,)"),
    "t batch": ({"t": torch.zeros(3)}, "t", "(3,)", "(2,)"),
    "t scalar": ({"t": torch.tensor(0.5)}, "t", "()", "(2,)"),
    "t nan": ({"t": torch.tensor([0.5, float("nan")])}, "t", "nan", "finite"),
    "t infinite": ({"t": torch.tensor([0.5, float("inf")])}, "t", "inf", "finite"),
    "context width": ({"context": torch.zeros(2, 3, 11)}, "context", "(2, 3, 11)", "(2, L, 12)"),
    "context batch": ({"context": torch.zeros(1, 3, 12)}, "context", "(1, 3, 12)", "(2, L, 12)"),
    "context dimensions": ({"context": torch.zeros(2, 12)}, "context", "(2, 12)", "(2, L, 12)"),
    "lengths shape": ({"context_lengths": torch.tensor([1])}, "context_lengths", "(1,)", "(2,) integers"),
    "lengths dtype": ({"context_lengths": torch.ones(2)}, "context_lengths", "float32", "(2,) integers"),
    "lengths range": ({"context_lengths": torch.tensor([1, 4])}, "context_lengths", "[1, 4]", "0 to 3"),
    "lengths negative": ({"context_lengths": torch.tensor([-1, 3])}, "context_lengths", "[-1, 3]", "0 to 3"),
    "positions tokens": ({"token_positions": torch.zeros(1, 11, 2)}, "token_positions", "(1, 11, 2)", "12, 2)"),
    "positions batch": ({"token_positions": torch.zeros(3, 12, 2)}, "token_positions", "(3, 12, 2)", "(2 or 1"),
    "positions pairs": ({"token_positions": torch.zeros(1, 12, 3)}, "token_positions", "(1, 12, 3)", "12, 2)"),
    "aspect shape": ({"log_aspect_ratio": torch.zeros(2, 1)}, "log_aspect_ratio", "(2, 1)", "(2,)"),
    "keep dtype": ({"keep": torch.zeros(2, 3)}, "keep", "float32", "int64"),
    "keep batch": ({"keep": torch.zeros(1, 1, dtype=torch.int64)}, "keep", "(1, 1)", "(2, K)"),
    "keep range": ({"keep": torch.tensor([[0, 12], [1, 2]])}, "keep", "0 to 12", "0 to 11"),
    "keep negative": ({"keep": torch.tensor([[0, -1], [1, 2]])}, "keep", "-1 to 2", "0 to 11"),
    "keep twice": ({"keep": torch.tensor([[0, 3], [2, 2]])}, "keep", "repeated", "distinct"),
    "keep none": ({"keep": torch.zeros(2, 0, dtype=torch.int64)}, "keep", "0 indices", "1 to 12"),
    "keep many": ({"keep": torch.zeros(2, 13, dtype=torch.int64)}, "keep", "13 indices", "1 to 12"),
    "mask shape": ({"keep": torch.ones(2, 11, dtype=torch.bool)}, "keep", "(2, 11)", "(2, 12)"),
    "mask empty": ({"keep": torch.zeros(2, 12, dtype=torch.bool)}, "keep", "no token", "at least 1"),
    "mask counts": ({"keep": torch.arange(24).view(2, 12) < 15}, "keep", "[12, 3]", "same count"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_message_names_argument_value_and_expectation(model: XUT, case: str) -> None:
    changes, argument, came, expected = BAD[case]
    with pytest.raises(ValueError, match=f"^{argument} ") as caught:
        model(**arguments(**changes))
    assert came in str(caught.value)
    assert expected in str(caught.value)


def test_good_input_passes(model: XUT) -> None:
    mask = torch.arange(12).expand(2, -1) < 5
    for keep in (None, mask, torch.tensor([[11, 0], [3, 4]])):
        out = model(
            **arguments(),
            keep=keep,
            context_lengths=torch.tensor([0, 3], dtype=torch.int32),
            token_positions=torch.zeros(1, 12, 2),
            log_aspect_ratio=torch.zeros(2),
        )
        assert out.shape == (2, 4, 8, 6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 60}, "width is 60; expected heads * head_dim = 16 * 64 = 1024"),
        ({"head_dim": 6, "heads": 4, "width": 24}, "head_dim is 6; expected a multiple of 4"),
        ({"depth": 0}, "depth is 0; expected an integer of at least 1"),
        ({"decoder_blocks": 1.5}, "decoder_blocks is 1.5; expected an integer"),
        ({"blocks_before": True}, "blocks_before is True; expected an integer"),
        ({"residual": "pre"}, "residual is 'pre'; expected one of input, normed"),
        ({"skips": "first"}, "skips is 'first'; expected one of mirrored, last, none, concatenation"),
        ({"positions": "paper"}, "positions is 'paper'; expected one of area, long_side"),
        ({"aspect_ratio": 1}, "aspect_ratio is 1; expected true or false"),
        ({"breadth": 8}, "unknown XUT fields ['breadth']"),
    ],
)
def test_bad_configurations_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        XUTConfig.from_json(changes)


def test_configuration_survives_json() -> None:
    config = XUTConfig.preset("xut_small", **PUBLISHED, patch_size=1)
    assert XUTConfig.from_json(config.to_json()) == config
    assert config.is_published_wiring
    assert (config.width, config.patch_size) == (896, 1)
    assert not XUTConfig.preset("xut_base").is_published_wiring


def test_unknown_presets_are_named() -> None:
    with pytest.raises(
        ValueError, match="preset is 'xut_huge'; expected one of xut_tiny, xut_demo, xut_small, xut_base"
    ):
        XUTConfig.preset("xut_huge")
