"""Draws that depend on (seed, stage, index) alone, and times that fill their strata."""

import torch
from scipy import stats

from hdm_lightning.training.modules import draws


def test_a_sample_has_the_same_draws_in_any_batch():
    whole = draws.draw(3, "a", torch.arange(10), (2, 4, 6), tokens=12)
    parts = [draws.draw(3, "a", torch.tensor(rows), (2, 4, 6), tokens=12) for rows in ([7, 2], [9])]
    assert torch.equal(whole.noise[[7, 2]], parts[0].noise)
    assert torch.equal(whole.scores[[9]], parts[1].scores)
    assert torch.equal(whole.uniform[[7, 2]], parts[0].uniform)


def test_noise_does_not_depend_on_whether_something_is_routed():
    routed = draws.draw(3, "a", torch.arange(4), (2, 4, 4), tokens=16)
    dense = draws.draw(3, "a", torch.arange(4), (2, 4, 4), tokens=0)
    assert dense.scores is None
    assert torch.equal(routed.noise, dense.noise)
    assert torch.equal(routed.uniform, dense.uniform)


def test_seed_stage_and_index_each_change_the_draws():
    base = draws.draw(3, "a", torch.tensor([5]), (1, 2, 2), tokens=0).noise
    for seed, stage, index in ((4, "a", 5), (3, "b", 5), (3, "a", 6)):
        assert not torch.equal(base, draws.draw(seed, stage, torch.tensor([index]), (1, 2, 2), 0).noise)


def test_noise_is_standard_normal_and_uniforms_are_uniform():
    drawn = draws.draw(0, "a", torch.arange(2000), (1, 4, 4), tokens=4)
    assert stats.kstest(drawn.noise.flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(drawn.uniform.numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(drawn.scores.flatten().numpy(), "uniform").pvalue > 0.01


def test_every_global_batch_holds_each_stratum_once_whatever_the_split():
    index = torch.arange(64, 128)
    whole = draws.strata(1, "a", index, 32)
    for half in (whole[:32], whole[32:]):
        assert sorted(half.tolist()) == list(range(32))
    assert whole[:32].tolist() != whole[32:].tolist()
    by_rank = torch.cat([draws.strata(1, "a", index[rank::4], 32) for rank in range(4)])
    assert torch.equal(by_rank, torch.cat([whole[rank::4] for rank in range(4)]))


def test_sub_seed_is_fixed_for_all_time():
    # Written down once: a change would change the order of every run that is to be resumed.
    assert draws.sub_seed(0, "px256", 12345) == 1984981737299560146
