"""The dual head: learns pairs, ranks held-out ones, and its ranks are counted right."""

from types import SimpleNamespace

import pytest
import torch

from hdm_lightning.evaluation import context
from hdm_lightning.evaluation.caption_parts import head_is_valid
from hdm_lightning.metrics.agreement_head import fit_dual_head, rank_shares
from hdm_lightning.metrics.bootstrap import Bootstrap


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


def recorded(rank_of_real, rank_of_decoded):
    """A context in which the head's two controls are measured already."""
    ranks = {"real": rank_of_real, "decoded": rank_of_decoded}
    done = {f"caption_rank_{kind}": Bootstrap(50).mean(torch.full((40,), rank)) for kind, rank in ranks.items()}
    return SimpleNamespace(real=SimpleNamespace(once=lambda key, *_: done[key]))


def test_the_head_counts_where_it_holds_after_the_autoencoder():
    assert head_is_valid(recorded(0.95, 0.90))
    assert not head_is_valid(recorded(0.9975, 0.557))  # that of the demo's pictures: domain, not captions
    assert not head_is_valid(recorded(0.5, 0.5))  # knows nothing at all


def test_a_head_fitted_on_decoded_images_holds_there_and_one_fitted_on_others_does_not():
    """An autoencoder that moves all features: what is learned before it does not hold after it."""
    images, texts, captions = pairs(700)
    held_images, held_texts, held_captions = pairs(200, seed=1)
    through = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(7))).Q
    decoded, held_decoded = images @ through + 2.0, held_images @ through + 2.0
    before, after = (fit_dual_head(each, texts, captions, steps=200, batch=128) for each in (images, decoded))
    ranks = [float(rank_shares(head(held_decoded, held_texts), held_captions).mean()) for head in (before, after)]
    assert ranks[1] > 0.95
    assert ranks[0] < 0.7


@pytest.mark.parametrize("record", [b"[" * 100_000, b"{", b"[1]", b"\xff"])
def test_a_record_that_cannot_be_read_counts_as_none(monkeypatch, record):
    sample = SimpleNamespace(members={"json": record})
    monkeypatch.setattr(context, "Reader", lambda *data: SimpleNamespace(read=lambda place: sample))
    real = SimpleNamespace(reference_plan=SimpleNamespace(locate=int), reference_stream=None)
    assert context.RealData.first_record.func(real) == {}
