"""The builder of kohya's folders: captions become the tag grammar, repeats and classes come from folder names."""

import pytest

from hdm_lightning.data.captions import CaptionRules, TagGrammar
from hdm_lightning.data.samples import stream
from hdm_lightning.datasets.kohya import KohyaOptions, build_kohya, canonical_caption, repeats_and_class
from shard_contents import rejections

OWN = KohyaOptions(kept="||", group=";;", tag=",", keep_tokens=2)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("1girl, solo ||| red $$ blue %% night", KohyaOptions(), "1girl, solo ||| red $$ blue %% night"),
        ("a || b, c ;; d", OWN, "a ||| b $$ c %% d"),
        ("a, b, c, d", OWN, "a, b ||| c $$ d"),
        ("a, b, c", KohyaOptions(tag=","), "a $$ b $$ c"),
        ("a sentence. And more", OWN, "a sentence. And more"),
        ("a, b", OWN, "a, b |||"),
        ("a, b, c ;; d", OWN, "a, b ||| c %% d"),
        (" , ;; ,", OWN, ""),
    ],
)
def test_kohya_captions_become_the_grammar(text, options, expected):
    found = canonical_caption(text, options)
    assert found == expected
    kept, groups = TagGrammar().parse(found)
    assert (
        TagGrammar().render(found, None)
        == ", ".join(([kept] if kept else []) + [tag for group in groups for tag in group])
        or "$$" not in found
    )


def test_repeats_come_from_the_innermost_folder():
    assert repeats_and_class("10_cat toy/a.png") == (10, "cat toy")
    assert repeats_and_class("2_x/5_red_fox/a.png") == (5, "red fox")
    assert repeats_and_class("plain/a.png") == (1, "")
    assert repeats_and_class("3_/7_a.png") == (3, "")


def test_a_kohya_folder_becomes_shards(kit, tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    for folder in ("3_red fox", "1_tagged", "loose"):
        (root / folder).mkdir(parents=True)
    (root / "3_red fox" / "a.png").write_bytes(kit.coloured(1))
    (root / "1_tagged" / "b.png").write_bytes(kit.coloured(2))
    (root / "1_tagged" / "b.caption").write_text("x, y, z")
    (root / "1_tagged" / "b.txt").write_text("not this one")
    (root / "loose" / "c.png").write_bytes(kit.coloured(3))
    options = KohyaOptions(tag=",", keep_tokens=1)
    report = build_kohya(root, out, options, processes=1)
    assert report.samples == 4 and rejections(out) == {
        "loose/c.png": "no caption",
        "1_tagged/b.txt": "another caption beside 1_tagged/b.caption, which is used",
    }
    samples = list(stream(kit.stream_config(out, captions=CaptionRules(drop=0.0)), kit.letters, stop=4))
    assert sorted((int(s.image[0, 0, 0]), s.caption) for s in samples) == [(1, "red fox")] * 3 + [(2, "x ||| y $$ z")]
    once = build_kohya(root, tmp_path / "once", KohyaOptions(apply_repeats=False), allow_missing=True, processes=1)
    assert once.samples == 3


def test_no_caption_of_a_kohya_folder_is_lost_to_its_name(kit, tmp_path):
    """What a `.json` says stays as it is; only where nothing says anything does the folder's name count."""
    root = tmp_path / "in" / "2_red fox"
    root.mkdir(parents=True)
    beside = {"record": ("json", b'{"captions": ["one", "two"]}'), "blank": ("txt", b" \n"), "seps": ("txt", b" , ")}
    for number, (name, (extension, data)) in enumerate(beside.items()):
        (root / f"{name}.png").write_bytes(kit.coloured(number))
        (root / f"{name}.{extension}").write_bytes(data)
    options = KohyaOptions(tag=",", keep_tokens=1, apply_repeats=False)
    assert build_kohya(tmp_path / "in", tmp_path / "out", options, processes=1).samples == 3
    config = kit.stream_config(tmp_path / "out", captions=CaptionRules(drop=0.0))
    found = {(int(sample.image[0, 0, 0]), sample.caption) for sample in stream(config, kit.letters, stop=90)}
    assert found == {(0, "one"), (0, "two"), (1, "red fox"), (2, "red fox")}
