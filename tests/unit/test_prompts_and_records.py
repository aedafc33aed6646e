"""Prompts and pictures of others: every encoding and script, and records that may hold anything."""

import codecs
import io
import json
import os
import random
import threading

import pytest
import torch
from PIL import Image, PngImagePlugin

from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError
from hdm_lightning.generation.drawing import LONGEST_PROMPT, _prompts
from hdm_lightning.generation.image_files import ImageRecord, read_record, write_png
from hdm_lightning.generation.image_writer import DrawJob, ImageWriter, slug
from hdm_lightning.generation.published_models import license_note
from hdm_lightning.generation.sampling_settings import DrawingRequest, SamplingSettings
from hdm_lightning.whole_files import write_text

SCRIPTS = (
    (0x20, 0x7E),
    (0xE0, 0x17F),
    (0x3B1, 0x3C9),
    (0x5D0, 0x5EA),
    (0x627, 0x64A),
    (0x4E00, 0x9FFF),
    (0x1F300, 0x1F5FF),
)


def text(lot: random.Random, most: int) -> str:
    """Letters of any script, no line feed."""
    return "".join(chr(lot.randint(*lot.choice(SCRIPTS))) for _ in range(lot.randint(1, most)))


def asked(**values):
    told = []
    return _prompts(DrawingRequest(model="m", **values), None, told.append), told


ENCODINGS = {"utf-8": b"", "utf-8-sig": b"", "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
ENCODINGS |= {"utf-32-le": codecs.BOM_UTF32_LE}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_of_prompts_is_read_whatever_its_encoding_and_script(tmp_path, encoding, end):
    lot = random.Random(encoding + end)
    inner = ["\u2028", "\x0b", "\x85", "\x1c", "\f"]  # which end no line
    lines = [f"x{text(lot, 40)}{lot.choice(inner)}{text(lot, 40)}y" for _ in range(100)]
    content = end.join(["", "# a comment", *lines, "   ", ""])
    (tmp_path / "p.txt").write_bytes(ENCODINGS[encoding] + content.encode(encoding))
    prompts, told = asked(prompt_file=str(tmp_path / "p.txt"))
    assert prompts == lines
    assert len(told) == 1 and "1 line(s) that begin with #" in told[0]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "shift-jis", "gbk"])
def test_other_encodings_are_refused_with_what_helps(tmp_path, encoding, monkeypatch):
    sample = {"shift-jis": "赤い星", "gbk": "红色"}.get(encoding, "déjà vu")
    (tmp_path / "p.txt").write_bytes(sample.encode(encoding))
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte \d") as caught:
        asked(prompt_file=str(tmp_path / "p.txt"))
    assert "iconv" in caught.value.hint
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sample.encode(encoding))))
    with pytest.raises(UserError, match="standard input: is not UTF-8"):
        asked(prompt_file="-")
    with pytest.raises(UserError, match="bytes that are not UTF-8"):
        asked(prompts=(sample.encode(encoding).decode("utf-8", "surrogateescape"),))


def test_an_empty_prompt_on_the_command_line_is_a_prompt():
    assert asked(prompts=("", "  ", " a star "))[0] == ["", "", "a star"]


def test_options_of_other_programs_are_warned_of(tmp_path):
    (tmp_path / "p.txt").write_text("a star --n blurry --w 64\nfive -- no six\n--seedling\n")
    prompts, told = asked(prompt_file=str(tmp_path / "p.txt"))
    assert len(prompts) == 3 and len(told) == 1 and "--negative-prompt" in told[0]


def test_what_no_model_reads_is_refused_before_it_is_tokenized():
    assert asked(prompts=("a" * LONGEST_PROMPT,))[0]
    with pytest.raises(UserError, match="100,001 characters"):
        asked(prompts=("a" * (LONGEST_PROMPT + 1),))


@pytest.mark.parametrize("way", ["file", "standard input"])
def test_prompts_without_end_are_read_no_further_than_any_list_goes(monkeypatch, way):
    with open("/dev/zero", "rb") as endless:
        monkeypatch.setattr("sys.stdin", endless)
        with pytest.raises(UserError, match="has more than"):
            asked(prompt_file="/dev/zero" if way == "file" else "-")


def test_a_pipe_of_prompts_is_read(tmp_path):
    """As the shell makes one: --prompts <(head -5 PROMPTS)."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("a cat\na dog\n"))
    writer.start()
    assert asked(prompt_file=str(tmp_path / "pipe")) == (["a cat", "a dog"], [])
    writer.join()


def test_halves_of_pairs_are_tokenized_like_any_unknown_character(tiny_text_encoder):
    bound = Tokenizer(str(tiny_text_encoder)).bind(8)
    assert bound("a \ud83d star") == bound("a \ufffd star")
    assert bound("a \ud83d\ude00 star") == bound("a \U0001f600 star")


def test_names_of_files_stay_within_what_file_systems_allow(tmp_path):
    lot = random.Random(0)
    for number in range(500):
        prompt = text(lot, 300)
        name = f"{number:04d}-{slug(prompt)}-{2**63 - 1}.png"
        assert len(name.encode()) < 150 and "/" not in name and "\0" not in name
        write_text(tmp_path / name, prompt)
    longest = "赤" * 85  # 255 bytes
    write_text(tmp_path / longest, "x")
    assert (tmp_path / longest).read_text() == "x"


def record() -> ImageRecord:
    return ImageRecord("a red star", 7, SamplingSettings(height=64, width=64), "runs/x", "0" * 64)


def stored(path, written, *, behind=False) -> None:
    info = PngImagePlugin.PngInfo()
    if behind:
        info.add_itxt("hdm-lightning", written)
        info.chunks[-1] = (*info.chunks[-1][:2], True)
    else:
        info.add_itxt("hdm-lightning", written)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


@pytest.mark.parametrize("behind", [False, True])
def test_a_record_is_found_before_the_pixels_and_behind_them(tmp_path, behind):
    write_png(tmp_path / "a.png", torch.zeros(3, 8, 8, dtype=torch.uint8), record())
    assert read_record(tmp_path / "a.png") == record()
    stored(tmp_path / "b.png", json.dumps(record().to_json()), behind=behind)
    assert read_record(tmp_path / "b.png") == record()


@pytest.mark.parametrize("links", [True, False])
def test_two_that_draw_into_one_folder_at_once_lose_no_image(tmp_path, monkeypatch, links):
    """Both have counted what was there before; also where the file system has no links between names."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: os.open("/dev/null/x", os.O_RDONLY))
    lot, job = random.Random(0), DrawJob("a cat", 0, SamplingSettings(height=8, width=8))
    writers = [ImageWriter(tmp_path, model="m", fingerprint=each) for each in "ab"]
    drawn = {}
    for number in range(12):
        image = torch.full((3, 8, 8), number, dtype=torch.uint8)
        drawn[lot.choice(writers).add(job, image)] = number
    sheets = {writer.write_sheet() for writer in writers}
    assert len(drawn) == 12 and len(sheets) == 2
    assert {path: Image.open(path).getpixel((0, 0)) for path in drawn} == {path: (n,) * 3 for path, n in drawn.items()}
    assert sorted(tmp_path.iterdir()) == sorted([*drawn, *sheets])


WRONG = (None, True, -1, 10**30, 1.5, float("nan"), "", "64", "x" * 1000, [], [1], {}, {"a": 1}, "\x1b[2J\u202e")


def mutated(lot: random.Random, value):
    """A JSON value with one thing in it replaced, removed or added."""
    if isinstance(value, dict) and value and lot.random() < 0.8:
        key = lot.choice(list(value))
        if lot.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated(lot, value[key])}
    return lot.choice(WRONG)


def test_a_record_with_anything_in_it_is_read_or_refused(tmp_path):
    lot, refused = random.Random(0), 0
    for _ in range(500):
        written = mutated(lot, record().to_json())
        try:
            ImageRecord.from_json(written if isinstance(written, dict) else {})
        except ValueError:
            refused += 1
    assert refused > 300
    for written in ("[1]", "null", "{", "[" * 100_000, "3", '"x"', "", "{}"):
        stored(tmp_path / "a.png", written)
        with pytest.raises(UserError) as caught:
            read_record(tmp_path / "a.png")
        assert caught.value.hint


@pytest.mark.parametrize("kind", ["large text", "text", "cut", "empty", "folder", "missing", "jpeg"])
def test_what_is_no_picture_of_ours_is_a_mistake_of_the_file(tmp_path, kind):
    path = tmp_path / "a.png"
    write_png(path, torch.zeros(3, 64, 64, dtype=torch.uint8), record())
    if kind == "large text":
        info = PngImagePlugin.PngInfo()
        info.add_text("hdm-lightning", "x" * 2_000_000, zip=True)
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    elif kind == "text":
        path.write_text("no picture")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:40])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "jpeg":
        Image.new("RGB", (8, 8)).save(path, "JPEG")
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
    with pytest.raises(UserError) as caught:
        read_record(path)
    assert caught.value.where == str(path) and caught.value.hint


@pytest.mark.parametrize(
    "values",
    [{"height": "64"}, {"steps": 2.5}, {"steps": True}, {"steps": 10**9}, {"height": 10**6, "width": 10**6},
     {"shift": "x"}, {"guidance_interval": 3}, {"guidance_interval": ["a", "b"]}, {"negative_prompt": 1}],
)  # fmt: skip
def test_settings_of_the_wrong_kind_are_named(values):
    with pytest.raises(ValueError, match=f"^({'|'.join(values)}): got"):
        SamplingSettings.from_json(values)


@pytest.mark.parametrize("weight", [10**400, float("inf"), "1"])
def test_a_lora_s_weight_beyond_all_floats_is_refused(weight):
    record = ImageRecord("a", 0, SamplingSettings(), "m", "f", loras=({"name": "ink", "weight": 0.5},)).to_json()
    assert ImageRecord.from_json(record).loras[0]["weight"] == 0.5
    with pytest.raises(ValueError, match="loras"):
        ImageRecord.from_json({**record, "loras": [{"name": "ink", "weight": weight}]})


@pytest.mark.parametrize("front", ["license: " + "[" * 5_000, "license: " + "[" * 5_000 + "]" * 5_000, "[a", "- a"])
def test_a_card_that_cannot_be_read_tells_no_license(tmp_path, front):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert "is under mit" in license_note(tmp_path, "me/net")
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert "does not state a license" in license_note(tmp_path, "me/net")
