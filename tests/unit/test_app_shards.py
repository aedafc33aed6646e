"""Search, crops and marks of the page: against what lies in the shards, and what a training's stream gives."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from hdm_lightning.app.shard_search import Address, ShardSet, left_out, mark, unmark, whole
from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.index import load_index
from hdm_lightning.data.inspection import preview
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import stream
from hdm_lightning.errors import UserError


@pytest.fixture
def shards(tiny_shards, tmp_path):
    return str(shutil.copytree(tiny_shards, tmp_path / "shards"))


def captions(place):
    """Keys and captions, by the stream that validation reads."""
    config = replace(ShardSet(place).stream(16), captions=CaptionRules(drop=0))
    return {s.key: s.caption for s in stream(config, lambda _: ([0], 1), stop=40, training=False)}


def words(caption):
    return [0] * len(caption.split()), len(caption.split())


def test_all_words_must_be_there_in_any_case(shards):
    known = captions(shards)
    wanted = {key for key, text in known.items() if "circle" in text and "left" in text}
    found = ShardSet(shards).search("LEFT circle", limit=40)
    assert {f"{hit.shard}/{hit.key}" for hit in found.hits} == wanted and 0 < len(wanted) < 40
    assert (found.looked_at, found.next_row) == (40, None)
    assert all(hit.captions == (known[f"{hit.shard}/{hit.key}"],) for hit in found.hits)


def test_a_search_goes_on_where_it_ended(shards):
    whole_set, rows, start = ShardSet(shards), [], 0
    while start is not None:
        found = whole_set.search("", start=start, limit=7)
        rows += [hit.address for hit in found.hits]
        start = found.next_row
    assert rows == [hit.address for hit in whole_set.search("", limit=40).hits] and len({*rows}) == 40
    assert len(whole_set.search("", patience_s=0).hits) == 1  # out of time, and still a step ahead


def test_a_search_goes_on_behind_a_sample_that_was_left_out_meanwhile(shards):
    keys = [f"{hit.shard}/{hit.key}" for hit in ShardSet(shards).search("", limit=40).hits]
    first = ShardSet(shards).search("", limit=7)
    bad = first.hits[2]
    mark(shards, bad.shard, bad.address.ordinal, bad.key, "blurred")
    rest = ShardSet(shards).search("", start=first.without_one().next_row, limit=40)
    assert [f"{hit.shard}/{hit.key}" for hit in rest.hits] == keys[7:]
    assert rest.without_one().next_row is None


def test_behind_the_last_sample_there_is_nothing(shards):
    found = ShardSet(shards).search("", start=40)
    assert (found.hits, found.looked_at, found.next_row) == ((), 0, None)


def test_a_sample_is_found_by_its_key(shards):
    (hit,) = ShardSet(shards).search("00037").hits
    assert (hit.shard, hit.address, hit.key) == ("shard-00002.tar", Address(2, 5), "00037")
    assert whole(ShardSet(shards).raw(hit.address)).size == hit.image.size


@pytest.mark.parametrize("address", [Address(3, 0), Address(-1, 0), Address(0, 16), Address(0, -1)])
def test_an_address_beyond_the_set_is_refused(shards, address):
    with pytest.raises(UserError, match="there is no such"):
        ShardSet(shards).raw(address)


def test_appearances_are_those_of_the_training_s_own_stream(shards):
    looked = ShardSet(shards)
    config = looked.stream(24, seed=3, stage="px24", flip=True)
    (hit,) = looked.search("00037").hits
    seen = looked.appearances(hit.address, config, 3)
    expected = [s for s in stream(config, words, stop=160) if s.key == "shard-00002.tar/00037"][:3]
    assert len({sample.index // 40 for sample in expected}) == 3  # one a pass
    for (image, text), sample in zip(seen, expected, strict=True):
        theirs, line = preview(sample)
        assert text == line and np.array_equal(np.asarray(image), np.asarray(theirs))


def test_the_order_is_that_of_the_training(shards):
    looked = ShardSet(shards)
    config = looked.stream(16, stage="px16")
    shown = [text for _, text in looked.order(config, 11, 5)]
    assert shown == [preview(sample)[1] for sample in stream(config, words, start=11, stop=16)]


def test_a_marked_sample_is_in_no_plan_and_can_be_taken_back(shards):
    before = Plan(ShardSet(shards).stream(16)).fingerprint
    (hit,) = ShardSet(shards).search("00037").hits
    assert mark(shards, hit.shard, hit.address.ordinal, hit.key, "  a\nwatermark ") == 39
    assert left_out(shards) == [("shard-00002.tar", 5, "marked by hand: a watermark")]
    assert ShardSet(shards).search("00037").hits == ()
    config = ShardSet(shards).stream(16)
    assert Plan(config).fingerprint != before
    assert "shard-00002.tar/00037" not in {s.key for s in stream(config, words, stop=39)}
    with pytest.raises(UserError, match="already left out"):
        mark(shards, hit.shard, hit.address.ordinal, hit.key, "again")
    assert unmark(shards, hit.shard, 5) == 40
    assert Plan(config).fingerprint == before and load_index(shards) == load_index(shards)
    with pytest.raises(UserError, match="not left out by hand"):
        unmark(shards, hit.shard, 5)


@pytest.mark.parametrize(
    ("shard", "ordinal", "reason", "what"),
    [
        ("shard-00000.tar", 16, "bad", "is missing"),
        ("shard-00000.tar", -1, "bad", "is missing"),
        ("../shard-00000.tar", 0, "bad", "is missing"),
        ("shard-00000.tar", 0, " \n", "reason: is empty"),
    ],
)
def test_marks_that_make_no_sense_change_nothing(shards, shard, ordinal, reason, what):
    before = load_index(shards)
    with pytest.raises(UserError, match=what):
        mark(shards, shard, ordinal, "key", reason)
    assert load_index(shards) == before


def test_a_remote_set_cannot_be_marked():
    with pytest.raises(UserError, match="is not a local folder"):
        mark("https://127.0.0.1/{00..01}.tar", "00.tar", 0, "key", "bad")
