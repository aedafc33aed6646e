"""Captions by a vision-language model: what lands in the shards, what happens to failures, and calls that go on."""

import json
import os
from functools import partial

import pytest
import torch
from PIL import Image

import tiny_captioners
from hdm_lightning.cli.caption_shards import PROMPTS, prompts_from
from hdm_lightning.cli.shards import main
from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.index import load_index
from hdm_lightning.data.latent_sets import LatentFormat
from hdm_lightning.data.samples import stream
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.datasets import captioning
from hdm_lightning.datasets.captioning import CaptionedSet, CaptionOptions
from hdm_lightning.datasets.encoding import EncodedSet, EncodeOptions
from hdm_lightning.datasets.filter_rules import Filter, Rule
from hdm_lightning.datasets.filtering import FilteredSet
from hdm_lightning.encoders.captioner import load_captioner
from hdm_lightning.errors import UserError
from shard_contents import digests, samples_in


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    return tiny_captioners.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def blip(tmp_path_factory):
    return tiny_captioners.save_blip(tmp_path_factory.mktemp("blip"))


def red_or_blue(images, prompt):
    """A stand-in that sees one thing, says it for certain pictures alone, and refuses others."""
    if any(image.getpixel((0, 0))[0] == 13 for image in images):
        raise ValueError("absolute aspect ratio must be smaller than 200 \x1b[2J")
    return [(_say(image.getpixel((0, 0))[0], prompt), image.getpixel((0, 0))[0] % 2 == 1) for image in images]


def _say(level, prompt):
    return {3: " \u200b\n", 4: "x" * 70_000, 5: "a\x07 caption\x1b[31m"}.get(level, f"{prompt} {level}")


def options(describe=red_or_blue, **changes):
    chosen = {"model": "OWNER/NAME", "fingerprint": "f", "prompts": {"long": "what", "tags": "tags"}, "batch_size": 4}
    return CaptionOptions(start=partial(_started, describe), **{**chosen, **changes})


def _started(describe, device):
    return describe


def captions(sample):
    return {each["kind"]: each["text"] for each in json.loads(sample.members["json"]).get("captions", [])}


def test_new_shards_hold_the_same_samples_with_the_captions_and_their_origin(kit, tmp_path):
    folder = kit.write_shards(tmp_path / "set", [7, 5])
    before = digests(folder)
    index, summary = CaptionedSet(str(folder), tmp_path / "out", options()).make()
    assert digests(folder) == before
    old, new = samples_in(folder), samples_in(tmp_path / "out")
    assert [each.key for each in new] == [each.key for each in old] and index.samples == 12
    assert [each.name for each in index.shards] == [each.name for each in load_index(folder).shards]
    for number, (was, now) in enumerate(zip(old, new, strict=True)):
        assert {**now.members, "json": 0} == {**was.members, "json": 0}
        record = json.loads(now.members["json"])
        assert record.pop("captions", []) or number in (3, 4)
        assert record == json.loads(was.members["json"])
    first = json.loads(new[0].members["json"])["captions"]
    assert first == [
        {"text": "what 0", "kind": "long", "model": "OWNER/NAME", "prompt": "what"},
        {"text": "tags 0", "kind": "tags", "model": "OWNER/NAME", "prompt": "tags"},
    ]
    assert captions(new[5]) == {"long": "a caption[31m", "tags": "a caption[31m"}
    silent, endless = "the model returned no text", "the model's caption is too long"
    of = {"000.tar/000003": silent, "000.tar/000004": endless}
    assert summary.faults == [[key, f"{kind}: {reason}"] for key, reason in of.items() for kind in ("long", "tags")]
    assert summary.captions == {"long": 10, "tags": 10} and summary.samples == 12 and summary.cut == 10


FORMER = {
    "text": ({"caption": "old"}, {"old"}),
    "list": ({"caption": ["old", {"text": "older", "weight": 2}]}, {"old", "older"}),
    "both": ({"captions": ["one"], "caption": "hidden before"}, {"one"}),
    "own kind": ({"caption": {"text": "old", "kind": "human"}}, {"old"}),
    "none": ({"caption": "", "captions": [], "x": 1}, set()),
    "no text": ({"caption": 7}, set()),
    "no texts": ({"captions": {"text": [1]}, "caption": "old"}, {"old"}),
}


@pytest.mark.parametrize("name", FORMER)
def test_captions_of_the_record_are_drawn_beside_the_new_ones(kit, tmp_path, name):
    """Whatever key held them: none that a training has read is hidden by a new one or makes it unreadable."""
    record, former = FORMER[name]
    kit.write_tar(tmp_path / "set" / "0.tar", [("a.png", kit.coloured(20)), ("a.json", json.dumps(record).encode())])
    index_shards(tmp_path / "set")
    CaptionedSet(str(tmp_path / "set"), tmp_path / "out", options(prompts={"long": "p"})).make()
    (sample,) = samples_in(tmp_path / "out")
    assert {each.text for each in CaptionRules().all_of(sample.members)} == former | {"p 20"}
    of_old_kind = CaptionRules(kinds={"caption": 1.0, "captions": 1.0, "human": 1.0}).of_every_place(sample.members)
    texts = [each.text for each in of_old_kind if each.kind != "long"]
    assert sorted(texts) == sorted(former | ({"hidden before"} if name == "both" else set()))


def test_what_cannot_be_described_stays_in_its_place_and_is_named(kit, tmp_path):
    entries = kit.entries_of(10, 3)  # 10, 11, 12
    entries += [("bad.png", kit.coloured(1)[:60]), ("bad.txt", b"old")]
    entries += [("odd.png", kit.coloured(13)), ("odd.json", b"{")]
    entries += [("good.png", kit.coloured(20)), ("good.json", b"[1]")]
    entries += [("list.png", kit.coloured(22)), ("list.json", b'{"captions": "one before", "aesthetic": 5}')]
    kit.write_tar(tmp_path / "set" / "a" / "000.tar", entries)
    index_shards(tmp_path / "set")
    _, summary = CaptionedSet(str(tmp_path / "set"), tmp_path / "out", options(prompts={"long": "p"})).make()
    found = {each.key: each for each in samples_in(tmp_path / "out")}
    assert list(found) == ["000010", "000011", "000012", "bad", "odd", "good", "list"]
    assert "json" not in found["bad"].members and found["odd"].members["json"] == b"{"
    assert json.loads(found["list"].members["json"])["captions"][0] == "one before"
    assert captions(found["good"]) == {"long": "p 20"}
    reasons = dict(summary.faults)
    assert "undecodable" in reasons["a/000.tar/bad"]
    assert "long: the model cannot handle it: ValueError: absolute aspect" in reasons["a/000.tar/odd"]
    assert "record left out" in reasons["a/000.tar/good"]
    told = (tmp_path / "out" / "rejected.tsv").read_text()
    assert len(told.splitlines()) == 3 and "\x1b" not in told


def test_a_sample_of_other_bytes_than_were_indexed_is_left_out(kit, tmp_path):
    folder = kit.write_shards(tmp_path / "set", [5])
    data = bytearray((folder / "000.tar").read_bytes())
    data[data.index(b"number 2")] = ord("N")
    (folder / "000.tar").write_bytes(data)
    index, summary = CaptionedSet(str(folder), tmp_path / "out", options()).make()
    assert (
        index.samples == 4
        and ["000.tar/#2", "left out: the shard does not match its index: other bytes than were indexed"]
        in summary.faults
    )


def test_a_call_that_was_killed_goes_on_at_its_batch_and_gives_the_same_bytes(kit, tmp_path):
    """Killed at every batch in turn: in the end all is as if nothing had happened, and nothing was asked twice."""
    folder = kit.write_shards(tmp_path / "set", [9, 4])
    CaptionedSet(str(folder), tmp_path / "whole", options()).make()
    asked = tmp_path / "asked"

    def dying(images, prompt):
        if prompt == "tags":
            with asked.open("a") as file:
                file.writelines(f"{image.getpixel((0, 0))[0]}\n" for image in images)
            if len(images) % 4 == 0 or len(asked.read_text().splitlines()) % 3 == 0:
                answers = red_or_blue(images, prompt)
                captioning.append_line = lambda *given: (append(*given), os._exit(9))
                return answers
        return red_or_blue(images, prompt)

    append, out, calls = captioning.append_line, tmp_path / "out", 0
    while calls < 20:
        calls += 1
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            CaptionedSet(str(folder), out, options(dying)).make()
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break
    assert 3 < calls < 20
    assert sorted(map(int, asked.read_text().split())) == list(range(13))
    assert digests(out) == digests(tmp_path / "whole")
    for name in ("index.json", "rejected.tsv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(out.glob(".*captions*"))


def test_killed_between_a_shard_and_its_line_in_the_journal_the_shard_is_written_again(kit, tmp_path):
    folder = kit.write_shards(tmp_path / "set", [6, 6])
    CaptionedSet(str(folder), tmp_path / "whole", options()).make()
    pid = os.fork()
    if pid == 0:
        captioning.note_scanned = lambda *given: os._exit(9)
        CaptionedSet(str(folder), tmp_path / "out", options()).make()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    again = CaptionedSet(str(folder), tmp_path / "out", options(_never))
    assert [each.record.name for each in again.missing()] == ["000.tar", "001.tar"]
    CaptionedSet(str(folder), tmp_path / "out", options()).make()
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    # done: nothing is asked any more, also in another batch size
    _, summary = CaptionedSet(str(folder), tmp_path / "out", options(_never, batch_size=3)).make()
    assert summary.captions == {"long": 10, "tags": 10}


def _never(images, prompt):
    raise AssertionError("asked again")


def test_other_options_and_other_shards_are_refused(kit, tmp_path):
    folder = kit.write_shards(tmp_path / "set", [4])
    CaptionedSet(str(folder), tmp_path / "out", options()).make()
    for other in (options(model="OTHER/NAME"), options(prompts={"long": "else"}), options(fingerprint="g")):
        with pytest.raises(UserError, match="another model"):
            CaptionedSet(str(folder), tmp_path / "out", other)
    with pytest.raises(UserError, match="already holds"):
        CaptionedSet(str(folder), folder, options())
    with pytest.raises(UserError, match="another process is writing captions"):
        one = CaptionedSet(str(folder), tmp_path / "third", options())
        (tmp_path / "third").mkdir()
        with captioning.alone_in(tmp_path / "third", "at work"):
            one.make()


def test_a_model_that_describes_nothing_is_told_at_once(kit, tmp_path):
    folder = kit.write_shards(tmp_path / "set", [40])
    asked = []

    def mute(images, prompt):
        asked.extend(images)
        return [("", False)] * len(images)

    with pytest.raises(UserError, match=r"none of the first 16 images: the model returned no text") as raised:
        CaptionedSet(str(folder), tmp_path / "out", options(mute, prompts={"long": ""})).make()
    assert len(asked) == 16 and "--prompt" in raised.value.hint

    def full(images, prompt):
        raise torch.OutOfMemoryError("2 GiB")

    with pytest.raises(UserError, match="not enough memory") as raised:
        CaptionedSet(str(folder), tmp_path / "out", options(full, prompts={"long": ""})).make()
    assert "--batch-size" in raised.value.hint


@pytest.mark.parametrize("name", ["llava", "blip"])
def test_a_real_model_describes_as_transformers_would_image_by_image(name, request, kit, tmp_path):
    """Batches of padded prompts say what each image gets alone, and prompts are not part of the answer."""
    folder = request.getfixturevalue(name)
    captioner = load_captioner(str(folder), device="cpu", max_tokens=6, where="--model")
    images = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue", "white", "green")]
    together = captioner.describe(images, "Describe the picture")
    assert together == [captioner.describe([image], "Describe the picture")[0] for image in images]
    assert len({each.text for each in together}) > 1
    assert not any(each.text.lower().startswith("describe the picture") for each in together)
    assert captioner.describe(images, "")  # a model may be asked nothing


def test_the_answer_is_what_greedy_search_adds_to_the_prompt(llava):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    image = Image.new("RGB", (40, 20), "blue")
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = AutoProcessor.from_pretrained(llava)
    inputs = processor(images=image, text="USER: <image> Describe now ASSISTANT: ", return_tensors="pt")
    tokens, words = inputs["input_ids"], []
    for _ in range(6):  # by hand: the likeliest next word, again and again
        with torch.no_grad():
            logits = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits
        words.append(int(logits[0, -1].argmax()))
        tokens = torch.cat([tokens, torch.tensor([[words[-1]]])], dim=1)
        if words[-1] == processor.tokenizer.eos_token_id:
            break
    said = load_captioner(str(llava), device="cpu", max_tokens=6, where="").describe([image], "Describe now")[0]
    assert said.text == processor.tokenizer.decode(words, skip_special_tokens=True)
    assert said.cut == (words[-1] != processor.tokenizer.eos_token_id)


def test_the_command_from_shards_to_a_training_stream(llava, kit, tmp_path, capsys):
    folder = kit.write_shards(tmp_path / "set", [9, 5])
    out = tmp_path / "out"
    words = ["caption", str(folder), "--model", str(llava), "--out", str(out), "--prompt", "long", "--prompt"]
    words += ["short=Describe briefly", "--batch-size", "4", "--max-tokens", "5", "--devices", "cpu"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert (
        "14 samples in 2 shards" in told
        and "data.captions.kinds={long: 1, short: 1, txt: 1, captions: 1, caption: 1}" in told
    )
    first = digests(out)
    assert main(words) == 0 and "14 of 14 images are in finished shards" in capsys.readouterr().out
    assert digests(out) == first
    rules = CaptionRules(kinds={"long": 1.0, "short": 1.0}, drop=0.0)
    seen = {each.caption for each in stream(kit.stream_config(out, captions=rules), kit.letters, stop=60)}
    every = {text for each in samples_in(out) for text in captions(each).values()}
    numbers = {f"number {number}" for number in range(14)}
    assert seen & every and seen - every <= numbers  # a sample of which nothing was said keeps its text
    assert main([*words[:-1], "2"]) == 0  # two processes, which find nothing to do
    shutil_out = tmp_path / "two"
    assert main([*words[:4], "--out", str(shutil_out), *words[6:-1], "2"]) == 0
    assert digests(shutil_out) == first


@pytest.mark.parametrize(
    ("given", "where", "match"),
    [
        (["--prompt", "poem"], "--prompt", "no default prompt"),
        (["--prompt", "txt=x"], "--prompt", "cannot be a kind"),
        (["--prompt", "a b=x"], "--prompt", "cannot be a kind"),
        (["--prompt", "long", "--prompt", "long=x"], "--prompt", "twice"),
    ],
)
def test_mistaken_prompts_are_named(given, where, match):
    words = [word for word in given if word != "--prompt"]
    with pytest.raises(UserError, match=match) as raised:
        prompts_from(words)
    assert raised.value.where == where
    assert prompts_from(None) == {"long": PROMPTS["long"]} and prompts_from(["my-own=a=b"]) == {"my-own": "a=b"}


def test_models_of_another_kind_and_code_in_a_folder(tiny_text_encoder, llava, kit, tmp_path, capsys):
    folder = kit.write_shards(tmp_path / "set", [2])
    words = ["caption", str(folder), "--out", str(tmp_path / "out"), "--devices", "cpu", "--model"]
    assert main([*words, str(tiny_text_encoder)]) == 2
    assert "preprocessor_config.json" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    evil = tmp_path / "evil"
    evil.mkdir()
    for file in llava.iterdir():
        (evil / file.name).write_bytes(file.read_bytes())
    config = json.loads((evil / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText"), "code.Evil"),
    }
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert main([*words, str(evil)]) == 2 and not (tmp_path / "ran").exists()
    assert "--model" in capsys.readouterr().err


def test_shards_in_subfolders_are_not_written_over(kit, tmp_path):
    """Where --out is their own folder."""
    for name in ("a/0.tar", "b/0.tar"):
        kit.write_tar(tmp_path / "set" / name, [("a.png", kit.coloured(20)), ("a.txt", b"old")])
    index_shards(tmp_path / "set")
    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    form = LatentFormat(16, 8, 4, "0" * 64, "name")
    for make in (
        lambda out: CaptionedSet(str(out), out, options(prompts={"long": "p"})).make(),
        lambda out: FilteredSet(str(out), Filter((Rule("width", least=100),))).write(out),
        lambda out: EncodedSet(str(out), out, form, EncodeOptions(lambda device: None, 1)).make(),
    ):
        with pytest.raises(UserError, match="already holds"):
            make(tmp_path / "set")
    assert before == {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
