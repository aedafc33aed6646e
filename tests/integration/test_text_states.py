"""Text states from disk: each caption once, the states that the encoder gives, and trainings that encode no caption."""

import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from composed import check_job, run_job, weights_of
from crash import crashing_at
from hdm_lightning import XUT, FlowModule, ShardDataModule, load_autoencoder, load_text_encoder
from hdm_lightning.cli.shards import main
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.data.text_states import PIECES_NAME, TABLE_NAME, TextStates, pieces_of
from hdm_lightning.data.verification import Problem, leave_out
from hdm_lightning.datasets import caption_states
from hdm_lightning.datasets.writer import write_shard
from hdm_lightning.encoders.text import TransformersTextEncoder
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUTConfig
from shard_writer import ShardWriter


def encode(shards, out, text_encoder, *more):
    words = ["--out", str(out), "--text-encoder", str(text_encoder), "--devices", "cpu", *more]
    return main(["encode-captions", str(shards), *words])


@pytest.fixture(scope="module")
def states(tiny_shards, tiny_text_encoder, tmp_path_factory):
    """The states of the tiny shards' captions, cut to 4 and to 8 tokens."""
    out = tmp_path_factory.mktemp("states")
    assert encode(tiny_shards, out, tiny_text_encoder, "--context-length", "8", "4") == 0
    return out


@pytest.fixture
def stored_job(toy_job, states):
    """As `toy_job`, with states from disk."""

    def configuration(folder, **stages):
        config = toy_job(folder, **stages)
        config["data"] = {**config["data"], "text_states": str(states)}
        return config

    return configuration


@pytest.fixture
def encoded(monkeypatch):
    """How many captions the text encoder is asked for."""
    counts, original = [], TransformersTextEncoder.encode

    def encode(self, tokens, lengths):
        counts.append(len(tokens))
        return original(self, tokens, lengths)

    monkeypatch.setattr(TransformersTextEncoder, "encode", encode)
    return counts


def captions_of(shards):
    """All captions, read without this project's reader."""
    for path in sorted(Path(shards).glob("*.tar")):
        with tarfile.open(path) as archive:
            yield from (archive.extractfile(each).read().decode() for each in archive if each.name.endswith(".txt"))


def looked_up(folder, captions, tokenizer, length):
    ids, counts = zip(*map(tokenizer.bind(length), captions), strict=True)
    tokens, lengths = torch.tensor(ids), torch.tensor(counts)
    return tokens, lengths, TextStates(folder).context(tokens, lengths, torch.ones(len(tokens)), captions)


@pytest.mark.parametrize("length", [4, 8])
def test_states_are_those_of_each_caption_encoded_alone(states, tiny_shards, tiny_text_encoder, length):
    text, captions = load_text_encoder(str(tiny_text_encoder)), ["", *captions_of(tiny_shards)]
    tokens, lengths, stored = looked_up(states, captions, text.tokenizer, length)
    alone = torch.cat([text.encode(tokens[row : row + 1], lengths[row : row + 1]) for row in range(len(captions))])
    torch.testing.assert_close(stored, alone, rtol=1e-5, atol=1e-6)
    assert lengths.min() < length  # the padding behind them is compared, too


def test_each_different_caption_takes_up_room_once(states, tiny_shards, tiny_text_encoder):
    bind = load_text_encoder(str(tiny_text_encoder)).tokenizer.bind
    ids = {tuple(bind(n)(text)[0][: bind(n)(text)[1]]) for text in ["", *captions_of(tiny_shards)] for n in (4, 8)}
    assert len(TextStates(states)) == len(ids) == json.loads((states / PIECES_NAME).read_text())["captions"]
    assert sum(len(np.load(piece)) for piece in pieces_of(states)) == sum(map(len, ids))


def test_several_processes_find_the_same(states, tiny_shards, tiny_text_encoder, tmp_path):
    words = ["--context-length", "4", "8"]
    arguments = ["--out", str(tmp_path), "--text-encoder", str(tiny_text_encoder), "--devices", "2", *words]
    assert main(["encode-captions", str(tiny_shards), *arguments]) == 0
    text, captions = load_text_encoder(str(tiny_text_encoder)), list(captions_of(tiny_shards))
    one, two = (looked_up(folder, captions, text.tokenizer, 8)[2] for folder in (states, tmp_path))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    keys = (np.load(folder / TABLE_NAME)[[0, 2]] for folder in (states, tmp_path))
    np.testing.assert_array_equal(*keys)


def test_a_killed_call_goes_on_and_a_half_piece_is_made_anew(
    states, tiny_shards, tiny_text_encoder, tmp_path, monkeypatch
):
    """Killed between the states of the second shard and the file by which it counts as done."""
    original, written = caption_states.write_atomically, []

    def write(path, fill):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        original(path, fill)

    monkeypatch.setattr(caption_states, "write_atomically", write)
    wanted = caption_states.EncodedCaptions.make
    with pytest.raises(KeyboardInterrupt):
        wanted(_captions(tiny_shards, tmp_path, tiny_text_encoder))
    with pytest.raises(UserError) as caught:
        TextStates(tmp_path)
    assert "encode-captions" in caught.value.hint
    monkeypatch.undo()
    assert encode(tiny_shards, tmp_path, tiny_text_encoder, "--context-length", "4", "8") == 0
    for one, other in zip(pieces_of(states), pieces_of(tmp_path), strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()


def _captions(shards, folder, text_encoder):
    """What the command makes, before it does."""
    found = []

    def keep(self, progress=None):
        found.append(self)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_states.EncodedCaptions, "make", keep)
        assert encode(shards, folder, text_encoder, "--context-length", "4", "8") == 0
    return found[0]


def test_losses_are_those_of_captions_encoded_as_they_come(states, tiny_shards, tiny_text_encoder, tiny_autoencoder):
    text, vae = load_text_encoder(str(tiny_text_encoder)), load_autoencoder(str(tiny_autoencoder))
    torch.manual_seed(0)
    network = XUT(XUTConfig(4, 1, 32, 48, 2, 16, 16, depth=1))
    torch.nn.init.normal_(network.output_projection.weight, std=0.1)
    module, losses = FlowModule(network, text, vae, learning_rate=0.1), []
    for folder in (None, str(states)):
        data = ShardDataModule(
            tiny_shards,
            resolution=16,
            batch_size=8,
            tokenizer=text.tokenizer,
            context_length=8,
            num_workers=0,
            lanes=2,
            text_states=folder,
        )
        (batch, *_) = data.val_dataloader()
        assert ("context" in batch) == (folder is not None)
        losses.append(module.validation_losses(dict(batch)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_no_caption_is_encoded_in_a_training_with_dropped_captions(stored_job, tmp_path, encoded):
    config = stored_job(tmp_path / "run", px16={}, px24={"resolution": 24, "context_length": 4})
    config["data"]["captions"] = {"drop": 0.3}
    assert run_job(check_job(config)) == 0
    assert not encoded


def test_a_stage_may_encode_as_they_come(stored_job, tmp_path, encoded):
    config = stored_job(tmp_path / "run", px16={}, px24={"resolution": 24, "data": {"text_states": None}})
    with crashing_at(2, stage="px24"):
        run_job(check_job(config))
    assert set(encoded) == {4} and encoded


def test_killed_and_resumed_equals_uninterrupted(stored_job, tmp_path):
    whole, killed = (stored_job(tmp_path / name, px16={}) for name in ("whole", "killed"))
    assert run_job(check_job(whole)) == 0
    with crashing_at(5):
        run_job(check_job(killed))
    assert run_job(check_job(killed)) == 0
    expected, got = weights_of(whole), weights_of(killed)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_what_does_not_fit_is_refused_before_a_run(stored_job, states, tmp_path):
    """Another layer's states, whitening, a context length that was not encoded, tags, and no such folder."""
    cases = {
        "data.text_states": [
            {"text_encoder": {"layer": -2}},
            {"data": {"captions": {"tags": {}}}},
            {"data": {"text_states": str(tmp_path / "none")}},
        ],
        "text_encoder.whiten_captions": [{"text_encoder": {"whiten_captions": 8}}],
        "data.context_length": [{"stage": {"context_length": 6}}],
    }
    for where, changes in cases.items():
        for change in changes:
            config = stored_job(tmp_path / "run", px16=change.pop("stage", {}))
            for group, values in change.items():
                config[group] = {**config[group], **values}
            with pytest.raises(UserError) as caught:
                check_job(config)
            assert caught.value.where == where and caught.value.hint, change
    assert not (tmp_path / "run").exists()


def test_a_caption_that_was_not_encoded_stops_the_training_with_its_words(stored_job, tmp_path):
    with ShardWriter(tmp_path / "other") as writer:
        for number in range(8):
            writer.write(f"{number}", {"png": _white(), "txt": "circle circle circle red circle"})
    config = stored_job(tmp_path / "run", px16={})
    config["data"] |= {"train": str(tmp_path / "other"), "lanes": 1}
    with pytest.raises(UserError) as caught:
        run_job(check_job(config))
    assert "circle circle circle red circle" in str(caught.value) and "encode-captions" in caught.value.hint
    assert (
        encode(tmp_path / "other", config["data"]["text_states"], config["text_encoder"]["name"]) == 2
    )  # other lengths


def test_the_hint_for_other_captions_helps(states, tiny_text_encoder, tmp_path):
    """Further shards go into the same folder."""
    with ShardWriter(tmp_path / "other") as writer:
        writer.write("0", {"png": _white(), "txt": "circle circle circle red circle"})
    out = tmp_path / "states"
    assert encode(tmp_path / "other", out, tiny_text_encoder, "--context-length", "8") == 0
    assert len(TextStates(out)) == 2
    with ShardWriter(tmp_path / "more") as writer:
        writer.write("0", {"png": _white(), "txt": "red"})
        writer.write("1", {"png": _white(), "json": {"captions": ["circle", {"text": "red", "weight": 2}]}})
    assert encode(tmp_path / "more", out, tiny_text_encoder, "--context-length", "8") == 0
    assert len(TextStates(out)) == 4  # the empty one, the first, "red", "circle"


def test_states_that_are_there_stay_true_while_others_come(
    states, tiny_shards, tiny_text_encoder, tmp_path, monkeypatch
):
    """A further set whose pieces sort before the old ones: killed before its table, then done; for old readers, too."""
    folder, text = shutil.copytree(states, tmp_path / "states"), load_text_encoder(str(tiny_text_encoder))
    captions = list(captions_of(tiny_shards))
    expected = looked_up(states, captions, text.tokenizer, 8)[2]
    early = TextStates(folder)
    write_shard(tmp_path / "other" / "aaa.tar", {"0": {"png": _white(), "txt": "circle circle circle red circle"}})
    index_shards(tmp_path / "other")
    words = ["--context-length", "4", "8"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(caption_states, "write_table", _raise_interrupt)
        _captions(tmp_path / "other", folder, tiny_text_encoder).make()
    assert len(pieces_of(folder)) > len(pieces_of(states)) and pieces_of(folder)[0].name.startswith("aaa")
    tokens, lengths, found = looked_up(folder, captions, text.tokenizer, 8)
    assert torch.equal(found, expected)
    assert encode(tmp_path / "other", folder, tiny_text_encoder, *words) == 0
    assert torch.equal(looked_up(folder, captions, text.tokenizer, 8)[2], expected)
    for reader in (early, pickle.loads(pickle.dumps(early))):
        assert torch.equal(reader.context(tokens, lengths, torch.ones(len(tokens)), captions), expected)


def _raise_interrupt(*_):
    raise KeyboardInterrupt


def test_other_fields_of_the_same_shards_are_encoded_too(tiny_text_encoder, tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("0", {"png": _white(), "json": {"caption": "red", "said": "blue circle"}})
    out, words = tmp_path / "states", ["--context-length", "8"]
    assert encode(tmp_path / "set", out, tiny_text_encoder, *words) == 0
    assert len(TextStates(out)) == 2
    assert encode(tmp_path / "set", out, tiny_text_encoder, *words, "--fields", "said") == 0
    assert len(TextStates(out)) == 3


def test_a_sample_whose_caption_cannot_be_read_is_recorded_as_in_its_shard(tiny_text_encoder, tmp_path):
    """Not by its row among the samples that are not left out."""
    samples = {str(number): {"png": _white(), "txt": "red"} for number in range(4)}
    write_shard(tmp_path / "set" / "0.tar", {**samples, "2": {"png": _white(), "json": b"{"}})
    index_shards(tmp_path / "set")
    leave_out(tmp_path / "set", [Problem("0.tar", "marked by hand", 0)])
    assert encode(tmp_path / "set", tmp_path / "states", tiny_text_encoder, "--context-length", "8") == 0
    (line,) = (tmp_path / "states" / caption_states.FAULTS_NAME).read_text().splitlines()
    assert (json.loads(line)["key"], json.loads(line)["ordinal"]) == ("2", 2)


def test_damaged_files_are_named(states, tiny_text_encoder, tmp_path):
    text = load_text_encoder(str(tiny_text_encoder))
    for name in (TABLE_NAME, PIECES_NAME, pieces_of(states)[0].name):
        folder = shutil.copytree(states, tmp_path / name)
        (folder / name).write_bytes(b"nothing")
        with pytest.raises(UserError) as caught:
            looked_up(folder, [""], text.tokenizer, 8)
        assert name in str(caught.value) and "delete" in caught.value.hint


def _white():
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(file, "PNG")
    return file.getvalue()
