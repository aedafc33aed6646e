"""The dual head: learns pairs, ranks held-out ones, and its ranks are counted right."""

import pytest
import torch

from hdm_lightning.metrics.agreement_head import fit_dual_head, rank_shares


def pairs(count, seed=0):
    """Two views of one hidden cause, each through a random map of its own."""
    random = torch.Generator().manual_seed(seed)
    cause = torch.randn(count, 6, generator=random)
    maps = torch.Generator().manual_seed(99)
    image, text = (torch.randn(6, width, generator=maps) for width in (20, 12))
    return torch.tanh(cause @ image), torch.tanh(cause @ text), [f"caption {number}" for number in range(count)]


def test_a_head_recognises_held_out_pairs_and_knows_nothing_about_shuffled_ones():
    images, texts, captions = pairs(700)
    head = fit_dual_head(images, texts, captions, steps=200, batch=128)
    images, texts, captions = pairs(200, seed=1)
    right = rank_shares(head(images, texts), captions)
    assert right.mean() > 0.95
    shuffled = rank_shares(head(images, texts.roll(1, 0)), captions)
    assert float(shuffled.mean()) == pytest.approx(0.5, abs=0.08)


def test_fitting_is_repeatable_and_leaves_the_random_state_alone():
    images, texts, captions = pairs(300)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    heads = [fit_dual_head(images, texts, captions, steps=20) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0](images, texts), heads[1](images, texts))
    other = fit_dual_head(images, texts, captions, steps=20, seed=1)
    assert not torch.equal(heads[0](images, texts), other(images, texts))


def test_ranks_count_captions_that_differ_and_ties_half():
    scores = torch.tensor([[0.9, 0.1, 0.9, 0.95], [0.2, 0.2, 0.1, 0.3], [0, 0, 1.0, 0], [0, 0, 0, 0]])
    ranks = rank_shares(scores, ["a", "b", "a", "c"])
    assert ranks.tolist() == pytest.approx([1 / 2, (0.5 + 1 + 0) / 3, 1.0, 0.5])


def test_too_few_pairs_and_equal_captions_are_named():
    images, texts, captions = pairs(100)
    with pytest.raises(ValueError, match="got 100 pairs, expected at least 256"):
        fit_dual_head(images, texts, captions)
    with pytest.raises(ValueError, match="all are equal"):
        rank_shares(torch.zeros(2, 2), ["a", "a"])
