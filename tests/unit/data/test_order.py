"""The order of samples: every claim of the construction, against brute force."""

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdm_lightning.data.order import ShardOrder, first_position, readers_per_rank
from hdm_lightning.data.randomness import Draws, permutation

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0)


def order_of(counts, *, seed=3, stage="s", lanes=12, window=4):
    return ShardOrder(counts, seed=seed, stage=stage, lanes=lanes, window=window)


class Slot(NamedTuple):
    """Where a sample lies."""

    shard: int
    rank: int
    pass_number: int


def located(order, position):
    window, place = order.window_of(position)
    return Slot(int(window.shards[place]), int(window.ranks[place]), window.pass_number)


@given(COUNTS, st.integers(1, 17), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_every_pass_holds_each_sample_once(counts, lanes, window, pass_number):
    order = order_of(counts, lanes=lanes, window=window)
    begin = pass_number * order.samples
    slots = [located(order, position) for position in range(begin, begin + order.samples)]
    expected = Counter((shard, rank) for shard, count in enumerate(counts) for rank in range(count))
    assert Counter((slot.shard, slot.rank) for slot in slots) == expected
    assert {slot.pass_number for slot in slots} == {pass_number}


@given(COUNTS, st.integers(0, 500), st.sampled_from([1, 2, 3, 4, 6, 12, 5, 7]), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_any_start_any_world_any_workers_give_the_same_sequence(counts, start, world, workers):
    whole = order_of(counts)
    expected = [located(whole, position) for position in range(start, start + 60)]
    found = {}
    for rank in range(world):
        for worker in range(workers):
            reader = order_of(counts)  # each reader starts with nothing, as after a restart
            first = first_position(start, rank, world) + worker * world
            for position in range(first, start + 60, world * workers):
                found[position] = located(reader, position)
    assert [found[position] for position in sorted(found)] == expected
    assert sorted(found) == list(range(start, start + 60))


def test_a_position_always_comes_from_lane_position_mod_lanes_and_a_rank_keeps_its_lanes():
    order = order_of([31, 17, 5], lanes=12)
    for position in range(500):
        window, place = order.window_of(position)
        assert window.lane == position % 12
        assert 0 <= place < len(window.ranks)
    for world in (1, 2, 3, 4, 6, 12):
        lanes = [{position % 12 for position in range(rank, 400, world)} for rank in range(world)]
        assert sum(len(own) for own in lanes) == 12


@pytest.mark.parametrize("window", [1, 4, 7])
def test_a_lane_reads_a_contiguous_range_within_each_pass_and_windows_never_overlap(window):
    counts = [50, 23, 70, 9]
    order = order_of(counts, lanes=5, window=window)
    starts = {}
    for pass_number in range(3):
        shard_order = permutation(len(counts), 3, "s", "shards", pass_number)
        line = [(int(shard), rank) for shard in shard_order for rank in range(counts[shard])]
        places = {slot: place for place, slot in enumerate(line)}
        for lane in range(5):
            own = [
                located(order, position)[:2]
                for position in range(pass_number * 152, (pass_number + 1) * 152)
                if position % 5 == lane
            ]
            on_line = sorted(places[slot] for slot in own)
            gaps = [after - before for before, after in pairwise(on_line)]
            # A range may wrap round the end of the line once, where the pass is turned.
            assert sum(gap != 1 for gap in gaps) <= 1
            assert len(own) in (30, 31)
            starts[pass_number, lane] = own[0]
    assert len(set(starts.values())) > 10


def test_resuming_needs_one_window_of_each_lane_and_no_more():
    order = order_of([400], lanes=4, window=8)
    for position in range(37, 400):
        window, _ = order.window_of(position)
        assert len(window.ranks) <= 8
    fresh = order_of([400], lanes=4, window=8)
    held, place = fresh.window_of(205)
    assert held.ranks.tolist() == order.window_of(205)[0].ranks.tolist()
    assert located(fresh, 205).rank == held.ranks[place]


@given(COUNTS, st.integers(1, 13), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_following_windows_are_those_that_the_lane_reads_next(counts, lanes, window):
    order = order_of(counts, lanes=lanes, window=window)
    for lane in range(lanes):
        expected = order.window_of(lane)[0]
        for position in range(lane, 60 * lanes, lanes):
            found = order.window_of(position)[0]
            assert (found.pass_number, found.number) == (expected.pass_number, expected.number)
            assert found.ranks.tolist() == expected.ranks.tolist()
            if order.window_of(position)[1] == len(found.ranks) - 1:
                expected = order.following(found)


def test_seed_stage_and_pass_change_the_order_and_nothing_else_does():
    base = [located(order_of([97, 11]), position)[:2] for position in range(108)]
    assert [located(order_of([97, 11]), position)[:2] for position in range(108)] == base
    assert [located(order_of([97, 11], seed=4), position)[:2] for position in range(108)] != base
    assert [located(order_of([97, 11], stage="t"), position)[:2] for position in range(108)] != base
    assert [located(order_of([97, 11]), position)[:2] for position in range(108, 216)] != base


def test_the_shuffle_is_global_over_shards():
    """Neighbours in the order come from everywhere: with 96 lanes a batch of 64 touches most of 20 shards."""
    order = ShardOrder([100] * 20, seed=0, stage="a", lanes=96, window=32)
    shards = [located(order, position).shard for position in range(2000)]
    distinct = [len(set(shards[begin : begin + 64])) for begin in range(0, 2000 - 64, 64)]
    # 64 independent draws from 20 shards touch 19.2 on average.
    assert np.mean(distinct) > 17
    positions = [located(order, position)[:2] for position in range(2000)]
    places = np.array([shard * 100 + rank for shard, rank in positions])
    correlation = np.corrcoef(places[:-1], places[1:])[0, 1]
    assert abs(correlation) < 0.1


def test_the_order_is_pinned():
    """The same numbers on every machine and version: a change here breaks every resume."""
    order = ShardOrder([5, 3, 4], seed=7, stage="256px", lanes=4, window=2)
    assert [tuple(located(order, position)) for position in range(14)] == PINNED


PINNED = [
    (0, 3, 0),
    (1, 1, 0),
    (2, 1, 0),
    (0, 0, 0),
    (0, 4, 0),
    (1, 0, 0),
    (2, 2, 0),
    (0, 2, 0),
    (2, 0, 0),
    (1, 2, 0),
    (2, 3, 0),
    (0, 1, 0),
    (2, 2, 1),
    (2, 0, 1),
]


def test_readers_per_rank_are_divisors_so_that_each_has_its_own_lanes():
    assert [readers_per_rank(wanted, lanes=96, world=4) for wanted in range(8)] == [0, 1, 2, 3, 4, 4, 6, 6]
    assert readers_per_rank(5, lanes=96, world=96) == 1
    assert readers_per_rank(7, lanes=96, world=5) == 6


def test_first_position_of_a_rank():
    assert [first_position(10, rank, 4) for rank in range(4)] == [12, 13, 10, 11]
    with pytest.raises(ValueError, match="rank must be in"):
        first_position(0, 4, 4)


def test_draws_are_uniform_and_depend_on_the_key_alone():
    values = np.array([Draws(1, "s", index, "crop").uniform() for index in range(4000)])
    assert abs(values.mean() - 0.5) < 0.02 and abs(values.std() - 12**-0.5) < 0.01
    ends = Counter(Draws(0, "s", index, "crop").below(3) for index in range(3000))
    assert all(abs(ends[value] - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for value in range(3))
    first, again = Draws(1, "a"), Draws(1, "a")
    assert [first.word() for _ in range(20)] == [again.word() for _ in range(20)]
    assert Draws(1, "a").word() != Draws(1, "b").word() != Draws(2, "a").word()


def test_weighted_draws_follow_the_weights():
    counts = Counter(Draws("w", index).weighted([1.0, 0.0, 3.0]) for index in range(4000))
    assert counts[1] == 0
    assert abs(counts[2] - 3000) < 4 * (4000 * 3 / 16) ** 0.5


def test_shuffled_reaches_every_permutation_equally():
    counts = Counter(tuple(Draws("p", index).shuffled("abc")) for index in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 4 * (6000 * 5 / 36) ** 0.5 for count in counts.values())


def test_permutation_is_a_permutation_and_bad_arguments_are_named():
    assert sorted(permutation(100, "x").tolist()) == list(range(100))
    assert permutation(0, "x").tolist() == []
    with pytest.raises(ValueError, match="lanes and window"):
        order_of([1], lanes=0)
    with pytest.raises(ValueError, match="at least one sample"):
        order_of([0, 0])
    with pytest.raises(ValueError, match="bound"):
        Draws(0).below(0)
