"""Kinds of captions: how often each is drawn, what stands in for one that is missing, and what statistics say."""

import json
from collections import Counter

import pytest

from hdm_lightning.cli.shards import main
from hdm_lightning.data.captions import CaptionRules, TagGrammar
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.inspection import collect
from hdm_lightning.data.randomness import Draws
from hdm_lightning.data.rules import rules_from
from hdm_lightning.data.samples import stream
from hdm_lightning.errors import UserError

LONG = [{"text": "long one", "kind": "long"}, {"text": "long two", "kind": "long", "weight": 3}]
RECORD = {"captions": [*LONG, {"text": "a $$ b", "kind": "tags"}, "plain"], "caption": "alt", "title": "the title"}
ALL = {"txt": b"short", "json": json.dumps(RECORD).encode()}
MIX = {"long": 6.0, "txt": 3.0, "tags": 1.0}


def drawn(rules, members, count=6000):
    return Counter(rules.choose(members, Draws("k", number)) for number in range(count))


def near(count, share, of):
    return abs(count - share * of) < 4 * (of * share * (1 - share)) ** 0.5


def test_each_kind_is_drawn_as_often_as_its_weight_says_and_within_it_by_the_captions_weights():
    counts = drawn(CaptionRules(kinds=MIX), ALL)
    assert set(counts) == {"short", "long one", "long two", "a $$ b"}
    expected = {"long one": 0.6 / 4, "long two": 0.6 * 3 / 4, "short": 0.3, "a $$ b": 0.1}
    assert all(near(counts[text], share, 6000) for text, share in expected.items())


def test_what_a_missing_kind_leaves_goes_to_the_others_in_proportion():
    without_long = {**ALL, "json": json.dumps({"captions": RECORD["captions"][2:]}).encode()}
    counts = drawn(CaptionRules(kinds=MIX), without_long)
    assert set(counts) == {"short", "a $$ b"} and near(counts["short"], 0.75, 6000)
    assert set(drawn(CaptionRules(kinds=MIX), {"json": ALL["json"]}, 300)) == {"long one", "long two", "a $$ b"}


def test_a_sample_of_no_wanted_kind_has_what_it_would_have_without_kinds():
    assert drawn(CaptionRules(kinds={"poem": 1.0}), ALL, 50) == {"short": 50}
    both = {"txt": b"x", "json": b'{"caption": "y"}'}
    assert drawn(CaptionRules(kinds={"poem": 1.0, "txt": 0.0}, prefer="json"), both, 50) == {"y": 50}
    with pytest.raises(SampleFault, match="no caption"):
        CaptionRules(kinds={"poem": 1.0, "txt": 0.0}).choose({"txt": b"never"}, Draws(1))
    assert CaptionRules(kinds={"poem": 1.0}, allow_missing=True).choose({}, Draws(1)) == ""


def test_any_key_of_the_record_is_a_kind_and_entries_without_one_are_of_their_key():
    assert drawn(CaptionRules(kinds={"title": 1.0}), ALL, 50) == {"the title": 50}
    assert drawn(CaptionRules(kinds={"captions": 1.0}), ALL, 50) == {"plain": 50}
    assert drawn(CaptionRules(kinds={"caption": 1.0}), ALL, 50) == {"alt": 50}


def test_the_order_in_which_kinds_are_written_draws_nothing_else():
    turned = CaptionRules(kinds=dict(reversed(MIX.items())))
    rules = CaptionRules(kinds=MIX)
    assert [rules.choose(ALL, Draws(n)) for n in range(100)] == [turned.choose(ALL, Draws(n)) for n in range(100)]


def test_validation_takes_the_likeliest_kind_that_is_there_and_tags_whole():
    assert CaptionRules(kinds=MIX).first(ALL) == "long one"
    assert CaptionRules(kinds=MIX).first({"txt": b"short"}) == "short"
    only_tags = {"json": json.dumps({"captions": RECORD["captions"][2:]}).encode()}
    assert CaptionRules(kinds=MIX, tags=TagGrammar()).first(only_tags) == "a, b"


def test_a_place_that_cannot_be_read_counts_for_nothing_beside_one_that_can():
    assert CaptionRules(kinds=MIX).first({"txt": b"short", "json": b"{"}) == "short"
    assert CaptionRules(kinds=MIX).first({"txt": b"\xff\xfex", "json": ALL["json"]}) == "long one"
    with pytest.raises(SampleFault, match="JSON"):
        CaptionRules(kinds=MIX).first({"json": b"{"})


def test_a_key_that_holds_no_captions_takes_none_from_the_others(kit, tmp_path):
    record = {"captions": ["good"], "caption": 7, "title": {"text": [1]}}
    members = {"json": json.dumps(record).encode()}
    assert drawn(CaptionRules(kinds={"captions": 1.0, "title": 1.0}), members, 20) == {"good": 20}
    with pytest.raises(SampleFault, match="not a string"):
        CaptionRules(kinds={"title": 1.0}, fields=("caption",)).of_every_place(members)
    kit.indexed(tmp_path / "0.tar", [("a.png", kit.coloured(1)), ("a.json", members["json"])])
    assert collect([str(tmp_path)]).caption_kinds["captions"].tolist() == [1]


def test_a_kind_of_any_type_and_control_characters_are_read_without_harm():
    odd = {"captions": [{"text": "\x1b[2Jred\u0007", "kind": ["x"]}, {"text": "blue", "kind": 5}, {"text": "\u200b"}]}
    members = {"json": json.dumps(odd).encode()}
    assert [each.text for each in CaptionRules().of_every_place(members)] == ["[2Jred", "blue"]
    assert drawn(CaptionRules(kinds={"5": 1.0}), members, 20) == {"blue": 20}


@pytest.mark.parametrize(
    ("kinds", "where"),
    [
        ({"long": -1}, "data.captions.kinds.long"),
        ({"long": float("nan")}, "data.captions.kinds.long"),
        ({"long": "much"}, "data.captions.kinds.long"),
        ({"long": 0, "txt": 0}, "data.captions.kinds"),
        ({}, "data.captions.kinds"),
        (["long"], "data.captions.kinds"),
    ],
)
def test_mistakes_name_their_key(kinds, where):
    with pytest.raises(UserError) as raised:
        rules_from({"kinds": kinds}, CaptionRules, "data.captions")
    assert raised.value.where == where


@pytest.fixture
def mixed(kit, tmp_path):
    """Twenty-four samples with a text, of which the first twelve have a long caption and the first six tags."""
    entries = []
    for number in range(24):
        captions = [{"text": f"a long caption of number {number}", "kind": "long"}] * (number < 12)
        captions += [{"text": f"tag {number}", "kind": "tags"}] * (number < 6)
        entries += [(f"{number:03d}.png", kit.coloured(number)), (f"{number:03d}.txt", f"number {number}".encode())]
        entries.append((f"{number:03d}.json", json.dumps({"captions": captions}).encode()))
    kit.indexed(tmp_path / "set" / "000.tar", entries)
    return tmp_path / "set"


def test_a_stream_draws_anew_at_each_sight_and_goes_on_exactly_wherever_it_begins(kit, mixed):
    config = kit.stream_config(mixed, captions=CaptionRules(kinds=MIX, drop=0.0))
    whole = [sample.caption for sample in stream(config, kit.letters, stop=2400)]
    assert whole[1000:1100] == [sample.caption for sample in stream(config, kit.letters, start=1000, stop=1100)]
    counts = Counter("long" if "long" in caption else caption.split()[0] for caption in whole)
    # of 24: six have all three, six have long (6) and txt (3), twelve have a text alone
    assert near(counts["long"], (6 * 0.6 + 6 * 6 / 9) / 24, 2400)
    assert near(counts["tag"], 6 * 0.1 / 24, 2400)
    assert near(counts["number"], (6 * 0.3 + 6 * 3 / 9 + 12) / 24, 2400)


def test_without_kinds_the_draws_are_what_they_were(kit, mixed):
    """The first word of `Draws` decides on dropping, the second among several captions."""
    members = {"json": json.dumps({"captions": ["one", {"text": "two", "weight": 3}]}).encode()}
    for number in range(50):
        draws, same = Draws("g", number), Draws("g", number)
        wanted = ["one", "two"][same.weighted([1.0, 3.0])]
        assert CaptionRules().choose(members, draws) == wanted and draws.word() == same.word()


def test_statistics_say_what_kinds_there_are_and_how_many(mixed, capsys):
    found = collect([str(mixed)], caption_samples=24)
    assert {kind: len(lengths) for kind, lengths in found.caption_kinds.items()} == {"long": 12, "tags": 6, "txt": 24}
    assert set(found.caption_kinds["long"].tolist()) == {6}
    assert main(["stats", str(mixed)]) == 0
    told = capsys.readouterr().out
    assert "kind long: 12 captions, median 6 words" in told and "kind txt: 24 captions, median 2 words" in told
    assert main(["show", str(mixed), "--kinds", "long=1", "txt=x", "--out", "x.png"]) == 2
