"""Captions: choice, grammar, cleaning, faults."""

import json
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdm_lightning.data.captions import CaptionRules, TagGrammar, clean, names_a_side
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.randomness import Draws

RECORD = json.dumps({"caption": "from json", "captions": ["one", {"text": "two", "weight": 3}], "width": 5}).encode()


def choices(rules, members, count=1000):
    return Counter(rules.choose(members, Draws("c", number)) for number in range(count))


def test_txt_comes_first_unless_json_is_preferred():
    members = {"txt": b" plain ", "json": b'{"caption": "record"}'}
    assert CaptionRules().first(members) == "plain"
    assert CaptionRules(prefer="json").first(members) == "record"
    assert CaptionRules().first({"json": members["json"]}) == "record"
    assert CaptionRules(prefer="json").first({"txt": b"plain", "json": b'{"width": 3}'}) == "plain"
    assert CaptionRules(prefer="json", fields=("title",)).first({"json": b'{"title": "t", "caption": "c"}'}) == "t"


def test_several_captions_come_by_weight():
    counts = choices(CaptionRules(), {"json": RECORD}, 4000)
    assert set(counts) == {"one", "two"}
    assert abs(counts["two"] - 3000) < 4 * (4000 * 3 / 16) ** 0.5
    assert CaptionRules().first({"json": RECORD}) == "one"
    zero = json.dumps({"captions": [{"text": "never", "weight": 0}, "always"]}).encode()
    assert choices(CaptionRules(), {"json": zero}, 50) == {"always": 50}


GRAMMAR = TagGrammar()
TEXT = "a girl, portrait ||| red $$ blue $$ green %% night $$ street"


def test_the_grammar_parts_a_caption():
    assert GRAMMAR.parse(TEXT) == ("a girl, portrait", [["red", "blue", "green"], ["night", "street"]])
    assert GRAMMAR.parse("x $$ y") == ("", [["x", "y"]])
    assert GRAMMAR.parse("kept |||") == ("kept", [])
    assert GRAMMAR.parse(" ||| $$ a $$ %% %% ") == ("", [["a"]])
    own = TagGrammar(kept=" :: ", group=" / ", tag=",")
    assert own.parse("k :: a, b / c") == ("k", [["a", "b"], ["c"]])


def test_without_draws_the_caption_is_whole_and_in_order():
    assert GRAMMAR.render(TEXT, None) == "a girl, portrait, red, blue, green, night, street"


def test_the_kept_part_stays_in_front_groups_stay_together_and_drops_have_their_rates():
    tags, groups, orders = Counter(), Counter(), set()
    count = 4000
    for number in range(count):
        pieces = GRAMMAR.render(TEXT, Draws("g", number)).split(", ")
        assert pieces[:2] == ["a girl", "portrait"]
        rest = pieces[2:]
        assert len(set(rest)) == len(rest) and set(rest) <= {"red", "blue", "green", "night", "street"}
        colours = [place for place, tag in enumerate(rest) if tag in ("red", "blue", "green")]
        assert colours == list(range(min(colours, default=0), max(colours, default=-1) + 1))
        tags.update(rest)
        groups["first" if colours and colours[0] == 0 and len(rest) > len(colours) else "other"] += 1
        orders.add(tuple(rest))
    for tag in ("red", "night", "street"):
        assert abs(tags[tag] / count - 0.7 * 0.75) < 4 * (0.525 * 0.475 / count) ** 0.5
    assert len(orders) > 60


def test_a_caption_with_one_group_keeps_it_and_loses_tags_at_their_rate():
    count, tags = 4000, Counter()
    for number in range(count):
        kept, *rest = GRAMMAR.render("me ||| a $$ b $$ c $$ d", Draws("one", number)).split(", ")
        assert kept == "me"
        tags.update(rest or ["none"])
    for tag in "abcd":
        assert abs(tags[tag] / count - 0.75) < 4 * (0.75 * 0.25 / count) ** 0.5
    assert tags["none"] / count < 0.25**4 + 4 * (0.25**4 / count) ** 0.5
    everything = TagGrammar(group_drop=1.0, tag_drop=0.0, shuffle=False)
    assert everything.render("a $$ b", Draws(1)) == "a, b"
    assert everything.render("a %% b", Draws(1)) == ""


def test_shuffle_and_drops_can_be_turned_off():
    still = TagGrammar(shuffle=False, group_drop=0.0, tag_drop=0.0)
    assert still.render(TEXT, Draws(1)) == GRAMMAR.render(TEXT, None)
    mixed = TagGrammar(group_drop=0.0, tag_drop=0.0)
    orders = {mixed.render("a $$ b $$ c", Draws(number)) for number in range(200)}
    assert len(orders) == 6 and all(sorted(order) == sorted("a, b, c") for order in orders)


def test_plain_captions_pass_the_grammar_untouched_and_separators_without_a_grammar_stay():
    rules = CaptionRules(tags=GRAMMAR)
    assert choices(rules, {"txt": b"a sentence, with commas"}, 20) == {"a sentence, with commas": 20}
    assert CaptionRules().first({"txt": b"a $$ b"}) == "a $$ b"


def test_choices_depend_on_the_draws_alone():
    rules = CaptionRules(tags=GRAMMAR)
    members = {"txt": TEXT.encode()}
    assert [rules.choose(members, Draws(n)) for n in range(30)] == [rules.choose(members, Draws(n)) for n in range(30)]
    assert len({rules.choose(members, Draws(n)) for n in range(30)}) > 10


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "no caption"),
        ({"txt": b""}, "no caption"),
        ({"txt": b" \n\t "}, "no caption"),
        ({"txt": b"\xff\xfebad"}, "not UTF-16-LE"),
        ({"txt": b"d\x92or"}, "not UTF-8: byte 0x92 at 1"),
        ({"txt": "\u200b\ufeff\u2800\u200d".encode()}, "no caption"),
        ({"json": b"{"}, "undecodable JSON"),
        ({"json": b"[1]"}, "undecodable JSON"),
        ({"json": b'{"caption": 5}'}, "undecodable JSON"),
        ({"json": b'{"captions": [["x"]]}'}, "undecodable JSON"),
        ({"json": b'{"captions": [{"text": "x", "weight": "y"}]}'}, "undecodable JSON"),
        ({"json": b'{"caption": ""}'}, "no caption"),
        ({"json": b"\xff"}, "not UTF-8"),
        ({"json": b'{"caption": ' + b"[" * 100_000}, "undecodable JSON"),
        ({"json": b'{"captions": [{"text": "x", "weight": 1' + b"0" * 400 + b"}]}"}, "undecodable JSON"),
    ],
)
def test_unusable_captions_are_faults(members, reason):
    for call in (lambda: CaptionRules().choose(members, Draws(0)), lambda: CaptionRules().first(members)):
        with pytest.raises(SampleFault, match=reason):
            call()


WEIGHTS = ("NaN", "Infinity", "-Infinity", "1e999", "1e308", "-1", "-1e-300", "1" + "0" * 20, '"3"', "true", "[]", "{}")


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("others", [1, 3])
def test_a_weight_that_nothing_can_be_drawn_by_is_a_fault_that_names_it(weight, others):
    """Two of the largest number are infinite together, and NaN is in no order: always the same caption would come."""
    for place in range(others + 1):
        captions = ['{"text": "good", "weight": 1}'] * others
        captions.insert(place, f'{{"text": "odd", "weight": {weight}}}')
        record = f'{{"captions": [{", ".join(captions)}]}}'.encode()
        for call in (CaptionRules().first, lambda members: CaptionRules().choose(members, Draws(0))):
            with pytest.raises(SampleFault, match=r"a caption's weight is .*, not 0 to 1e"):
                call({"json": record})


def test_the_largest_and_the_smallest_weights_are_drawn_by():
    record = (
        '{"captions": [{"text": "often", "weight": 1e9}, {"text": "seldom", "weight": 1e-300}, {"text": "as often", '
    )
    record += '"weight": 1e9}]}'
    drawn = [CaptionRules().choose({"json": record.encode()}, Draws(seed)) for seed in range(200)]
    assert 70 < drawn.count("often") < 130 and drawn.count("often") + drawn.count("as often") == 200


def test_half_a_surrogate_pair_never_reaches_the_tokenizer():
    members = {"json": b'{"caption": "x \\ud800 y"}'}
    assert CaptionRules().first(members) == "x y"
    with pytest.raises(SampleFault, match="not UTF-8"):
        CaptionRules(clean=False).first(members)


def test_missing_captions_may_be_allowed():
    rules = CaptionRules(allow_missing=True)
    assert rules.choose({}, Draws(0)) == "" == rules.first({"txt": b" "})
    with pytest.raises(SampleFault, match="UTF-8"):
        rules.first({"txt": b"\xff"})


def test_a_null_among_captions_counts_for_nothing():
    assert CaptionRules().first({"json": b'{"captions": [null, {"weight": 2}, "x"]}'}) == "x"


@given(st.text())
def test_cleaning_leaves_single_spaces_and_no_control_characters_and_is_idempotent(text):
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert "  " not in cleaned and cleaned == cleaned.strip()
    assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in cleaned)
    cleaned.encode("utf-8")


def test_cleaning_examples():
    assert clean(" a\r\n b\t\u00a0c \u0000d") == "a b c d"
    assert clean("e\u0301") == "\u00e9"
    assert clean("emoji \U0001f600 stays, \u4e2d\u6587 too") == "emoji \U0001f600 stays, \u4e2d\u6587 too"
    assert CaptionRules(clean=False).first({"txt": b"a  b"}) == "a  b"
    assert CaptionRules().first({"txt": b"\xef\xbb\xbfwith a mark"}) == "with a mark"


def test_captions_that_name_a_side():
    assert names_a_side("a cat Left of a dog") and names_a_side("turn right.")
    assert not names_a_side("bright leftovers, upright, copyright")
    tags = ("sword_in_left_hand", "facing_right", "left-handed", "a lefthanded man", "leftwards", "counterclockwise")
    assert all(names_a_side(tag) for tag in tags)
    assert np.mean([names_a_side(word) for word in ("left", "right", "rightmost", "up")]) == 0.75


def test_captions_and_records_without_end_are_refused_before_they_cost_time():
    """Alternating combining marks are put in order in quadratic time: two megabytes would take hours."""
    slow, rules, begin = "a" + "\u0301\u0327" * 500_000, CaptionRules(), time.monotonic()
    members = [{"txt": slow.encode()}, {"json": json.dumps({"caption": slow[:80_000]}).encode()}]
    members.append({"json": b'{"caption": "' + b"x" * (5 << 20) + b'"}'})
    for each in members:
        with pytest.raises(SampleFault, match="too long"):
            rules.first(each)
    assert time.monotonic() - begin < 1
    assert rules.first({"txt": b"word " * 10_000}).startswith("word word")
