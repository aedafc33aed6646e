"""The training loss in bins of the time, against numpy."""

import numpy as np
import pytest
import torch

from hdm_lightning.training.callbacks.step_metrics import add_in_time_bins, time_bin_tag


def test_each_bin_has_the_mean_of_its_samples_over_batches_and_processes():
    draw = torch.Generator().manual_seed(0)
    bins, packed, seen = 5, torch.zeros(2, 5), []
    for _ in range(2):  # processes
        totals = torch.zeros(2, bins)
        for _ in range(3):
            loss, t = torch.rand(7, generator=draw), torch.rand(7, generator=draw)
            weight = (torch.rand(7, generator=draw) > 0.3).float()
            add_in_time_bins(totals, loss, t, weight)
            seen.append(torch.stack([loss, t, weight]))
        packed += totals
    loss, t, weight = torch.cat(seen, dim=1).double().numpy()
    good = weight > 0
    assert 0 < good.sum() < good.size
    sums, _ = np.histogram(t[good], bins, (0, 1), weights=loss[good])
    counts, _ = np.histogram(t[good], bins, (0, 1))
    assert packed[0].numpy() == pytest.approx(sums, rel=1e-5)
    assert packed[1].tolist() == counts.tolist()


def test_both_ends_of_the_time_fall_into_the_outer_bins():
    totals = torch.zeros(2, 4)
    add_in_time_bins(totals, torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 0.25, 1.0]), torch.ones(3))
    assert totals.tolist() == [[1, 2, 0, 4], [1, 1, 0, 1]]


def test_the_graph_of_a_loss_is_not_kept():
    """As a training step of one's own may not detach what it returns."""
    totals = torch.zeros(2, 4)
    add_in_time_bins(totals, torch.ones(3, requires_grad=True), torch.rand(3), torch.ones(3))
    assert not totals.requires_grad


def test_tags_say_where_a_bin_begins_and_ends():
    assert [time_bin_tag(number, 8) for number in (0, 7)] == ["loss_by_time/0.000-0.125", "loss_by_time/0.875-1.000"]
