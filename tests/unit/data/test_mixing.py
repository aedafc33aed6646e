"""Mixtures of sources and blocks of buckets, against counting."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdm_lightning.data.order import BlockOrder, Mixture, even_pattern


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.sampled_from([1, 4, 12]))
@settings(max_examples=30, deadline=None)
def test_each_lane_of_a_source_is_read_in_its_own_order_without_gaps(weights, lanes):
    mixture = Mixture(weights, lanes)
    read = defaultdict(list)
    for position in range(3000):
        source, own = mixture.locate(position)
        assert len(weights) == 1 or own % lanes == position % lanes
        read[source, own % lanes].append(own // lanes)
    for rows in read.values():
        assert rows == list(range(len(rows)))


def test_shares_are_kept_over_the_whole_and_over_short_stretches():
    weights = [1.0, 2.0, 7.0]
    mixture = Mixture(weights, 96)
    sources = np.array([mixture.locate(position)[0] for position in range(96 * 400)])
    shares = np.bincount(sources) / len(sources)
    assert np.abs(shares - np.array(weights) / 10).max() < 0.002
    for begin in range(0, len(sources) - 960, 960):
        near = np.bincount(sources[begin : begin + 960], minlength=3) / 960
        assert np.abs(near - np.array(weights) / 10).max() < 0.03


@given(st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=6))
@settings(max_examples=25, deadline=None)
def test_pattern_gives_each_source_its_share(weights):
    pattern = even_pattern(weights)
    share = np.array(weights) / sum(weights)
    found = np.bincount(pattern, minlength=len(weights)) / len(pattern)
    assert np.abs(found / share - 1).max() < 0.01 and len(pattern) <= 2**20
    # In every prefix no source is more than a few places away from its share.
    for source in range(len(weights)):
        lag = np.cumsum(pattern == source) - share[source] * np.arange(1, len(pattern) + 1)
        assert np.abs(lag).max() < len(weights) + 0.01 * len(pattern) * share[source]


def test_a_tiny_source_beside_a_huge_one_is_not_read_too_often():
    pattern = even_pattern([8_000_000.0, 1000.0])
    assert abs((pattern == 1).mean() * 8001 - 1) < 0.01


def test_weights_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        Mixture([1.0, 0.0], 4)


@given(st.lists(st.integers(8, 90), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_buckets_get_their_samples_once_a_pass_in_whole_blocks(samples, block, seed):
    order = BlockOrder(samples, block=block, seed=seed, stage="s")
    read, before, passes = defaultdict(list), (0, -1), 4
    for position in range(passes * sum(samples)):
        bucket, own = order.locate(position)
        read[bucket].append(own)
        if position % block:
            assert bucket == before[0] and own == before[1] + 1
        before = (bucket, own)
    for bucket, positions in read.items():
        assert positions == list(range(len(positions)))
        # The tail of a pass is carried over: never more than a few blocks ahead or behind.
        assert abs(len(positions) - passes * samples[bucket]) <= block * (len(samples) + 1)


def test_blocks_mix_and_need_enough_samples():
    order = BlockOrder([400, 400], block=4, seed=0, stage="s")
    buckets = [order.locate(position)[0] for position in range(0, 800, 4)]
    changes = sum(one != other for one, other in pairwise(buckets))
    assert 70 < changes < 130
    assert Counter(buckets) == {0: 100, 1: 100}
    with pytest.raises(ValueError, match="at least a block"):
        BlockOrder([3, 400], block=4, seed=0, stage="s")
