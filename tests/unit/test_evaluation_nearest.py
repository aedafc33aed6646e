"""Nearest training pictures: found right, and copies are told from new pictures."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from hdm_lightning.metrics.bootstrap import Bootstrap
from hdm_lightning.metrics.neighbours import closeness_estimates, found_planted, nearest, pixel_rmse


def points(count, seed, width=4):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_the_nearest_is_that_of_scipy_in_any_blocks(monkeypatch):
    queries, among = points(33, 0), points(50, 1)
    table = cdist(queries.double().numpy(), among.double().numpy())
    for rows in (512, 7):
        monkeypatch.setattr("hdm_lightning.metrics.neighbours._BLOCK_ROWS", rows)
        found = nearest(queries, among)
        assert found.row.tolist() == table.argmin(1).tolist()
        np.testing.assert_allclose(found.distance, table.min(1), rtol=1e-6)


def test_a_pictures_own_name_does_not_count():
    among = points(20, 0)
    keys = [f"k{number}" for number in range(20)]
    alone = nearest(among, among)
    assert alone.distance.max() == 0
    others = nearest(among, among, query_keys=keys, keys=keys)
    table = cdist(among.numpy(), among.numpy()) + np.diag(np.full(20, np.inf))
    assert others.row.tolist() == table.argmin(1).tolist()
    with pytest.raises(ValueError, match="no row to compare with but itself"):
        nearest(among[:1], among[:1], query_keys=["a"], keys=["a"])


def test_copies_lie_nearer_than_held_out_pictures_and_new_ones_do_not():
    train, heldout = points(400, 0), points(300, 1)
    base = nearest(heldout, train).distance
    bootstrap = Bootstrap(resamples=300)
    copied = closeness_estimates(nearest(train[:200] + 0.01, train).distance, base, bootstrap)
    assert copied["closer"].value > 0.95
    assert copied["ratio"].high < 0.2
    new = closeness_estimates(nearest(points(300, 2), train).distance, base, bootstrap)
    assert new["closer"].low <= 0.05 <= new["closer"].high
    assert new["ratio"].low <= 1.0 <= new["ratio"].high
    assert new["ratio"].high - new["ratio"].low < 0.4


def test_copies_have_distance_exactly_zero_and_no_ratio_where_half_are():
    among = 100 * points(60, 0, width=300)
    found = nearest(among[20:50], among)
    assert found.row.tolist() == list(range(20, 50))
    assert found.distance.tolist() == [0.0] * 30
    heldout = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert set(closeness_estimates(torch.rand(5), heldout, Bootstrap(resamples=20))) == {"closer"}


def test_pixel_rmse_is_in_grey_levels():
    first = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    second = first.clone()
    second[0] += 10
    second[1, 0] = 30
    expected = [10.0, (900 / 3) ** 0.5]
    assert pixel_rmse(first, second).tolist() == pytest.approx(expected)


def decoded(pictures):
    """What a poor autoencoder leaves of images (B,3,H,W) in [0, 1]: means of 4 × 4 pixels, on a lattice of its own."""
    small = torch.nn.functional.avg_pool2d(pictures, 4)
    rows = torch.arange(pictures.shape[-1])
    return torch.nn.functional.interpolate(small, scale_factor=4) + ((rows[:, None] + rows) % 2)


def test_copies_behind_an_autoencoder_are_found_where_both_sides_went_through_it():
    """All drawn images are copies, and none is found among untouched images: the autoencoder's traces hide them."""
    random = torch.Generator().manual_seed(0)
    train, heldout = (torch.rand(count, 3, 16, 16, generator=random) for count in (300, 200))
    drawn = decoded(train[:100]) + 0.01 * torch.randn(100, 3, 16, 16, generator=random)
    found = {}
    for name, through in (("untouched", lambda pictures: pictures), ("both sides", decoded)):
        among, others = through(train).flatten(1), through(heldout).flatten(1)
        unseen, match = nearest(others, among).distance, nearest(drawn.flatten(1), among)
        found[name] = found_planted(match, list(range(100)), unseen).double().mean()
        closer = closeness_estimates(match.distance, unseen, Bootstrap(resamples=50))["closer"].value
        assert closer >= found[name]
    assert found == {"untouched": 0.0, "both sides": 1.0}
    # Nearer to another than to its own source is no copy found.
    swapped = found_planted(match, list(range(100))[::-1], unseen)
    assert not swapped.any()
