"""Token positions against the formulas worked out by hand."""

import math

import pytest
import torch

from hdm_lightning.models.positions import token_positions


@pytest.mark.parametrize("convention", ["area", "long_side"])
def test_a_square_spans_one_in_both_conventions(convention: str) -> None:
    positions = token_positions(2, 2, convention=convention)
    assert positions.tolist() == [[[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]]


def test_area_convention_keeps_the_product_of_reaches_at_one() -> None:
    positions = token_positions(2, 8, convention="area", dtype=torch.float64)[0]
    assert positions[0, 0] == pytest.approx(-0.5 * math.sqrt(2 / 8))
    assert positions[-1, 1] == pytest.approx((1 - 1 / 8) * math.sqrt(8 / 2))


def test_long_side_convention_gives_the_short_side_its_share() -> None:
    positions = token_positions(3, 6, convention="long_side", dtype=torch.float64)[0]
    assert positions[:, 0].unique().tolist() == pytest.approx([-1 / 3, 0, 1 / 3])
    assert positions[:6, 1].tolist() == pytest.approx([-5 / 6, -1 / 2, -1 / 6, 1 / 6, 1 / 2, 5 / 6])


@pytest.mark.parametrize("convention", ["area", "long_side"])
def test_a_crop_keeps_the_positions_of_the_full_image(convention: str) -> None:
    full = token_positions(6, 10, convention=convention, dtype=torch.float64).view(6, 10, 2)
    crop = torch.tensor([[0.0, 0.0, 6.0, 10.0], [2.0, 3.0, 6.0, 10.0]], dtype=torch.float64)
    found = token_positions(4, 4, crop=crop, convention=convention)
    assert torch.allclose(found[0], full[:4, :4].reshape(-1, 2), atol=1e-14)
    assert torch.allclose(found[1], full[2:6, 3:7].reshape(-1, 2), atol=1e-14)


def test_fractional_offsets_move_by_their_share_of_a_token() -> None:
    crop = torch.tensor([[0.0, 0.25, 4.0, 8.0]], dtype=torch.float64)
    moved = token_positions(4, 4, crop=crop, convention="long_side") - token_positions(
        4, 4, crop=crop.floor(), convention="long_side"
    )
    assert torch.allclose(moved[..., 1], torch.tensor(0.25 * 2 / 8, dtype=torch.float64))
    assert torch.equal(moved[..., 0], torch.zeros(1, 16, dtype=torch.float64))


def test_each_sample_has_its_own_full_image() -> None:
    crop = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 4.0, 4.0, 8.0]])
    found = token_positions(4, 4, crop=crop)
    assert torch.equal(found[:1], token_positions(4, 4))
    assert torch.allclose(found[1], token_positions(4, 8).view(4, 8, 2)[:, 4:].reshape(-1, 2))


def test_the_camera_shifts_then_zooms() -> None:
    still, moved = token_positions(3, 5), token_positions(3, 5, shift=(0.25, -0.5), zoom=2.0)
    assert torch.allclose(moved, (still + torch.tensor([0.25, -0.5])) / 2)


def test_dtype_follows_the_crop_but_never_goes_below_float32() -> None:
    crop = torch.tensor([[0, 0, 4, 4]])
    assert token_positions(4, 4, crop=crop.half()).dtype == torch.float32
    assert token_positions(4, 4, crop=crop).dtype == torch.float32
    assert token_positions(4, 4, crop=crop.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 0, "width": 4}, "0x4"),
        ({"height": 4, "width": 4, "zoom": 0.0}, "zoom is 0.0"),
        ({"height": 4, "width": 4, "crop": torch.zeros(4)}, r"crop has shape \(4,\)"),
        ({"height": 4, "width": 4, "convention": "short"}, "convention is 'short'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        token_positions(**arguments)
