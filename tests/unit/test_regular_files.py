"""Pipes, devices, sockets and folders in the place of files: no reader waits for them, reads on for ever or crashes."""

import os
import signal
import socket

import pytest

from hdm_lightning import json_files, regular_files, whole_files
from hdm_lightning.errors import UserError
from hdm_lightning.generation import image_files
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.interop import model_card, tensor_files
from hdm_lightning.training import checkpoint_io, recorded, run_folder

KINDS = {
    "pipe": os.mkfifo,
    "device without end": lambda path: path.symlink_to("/dev/zero"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "folder": os.mkdir,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "loop of links": lambda path: path.symlink_to(path.name),
    "huge and sparse": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}
READERS = {
    "JSON": json_files.read_object,
    "a run's configuration": recorded.read_recorded,
    "whether it is one": recorded.is_training,
    "JSON or nothing": json_files.object_or_empty,
    "the license of a card": model_card.card_license,
    "a checkpoint": checkpoint_io.read_checkpoint,
    "whether it is whole": checkpoint_io.is_intact,
    "weights": tensor_files.read_tensors,
    "an image's settings": image_files.read_record,
    "an image": lambda path: image_files.read_image(path, SamplingSettings()),
}


@pytest.fixture(autouse=True)
def in_time():
    """A reader that waits for a pipe waits for ever."""

    def too_long(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_named_or_counts_as_none(tmp_path, monkeypatch, kind, reader):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    path = (tmp_path / "x") if kind != "socket" else type(tmp_path)("x")
    KINDS[kind](path)
    try:
        found = READERS[reader](path)
    except UserError as error:
        assert str(path) in error.where and error.hint
    else:
        assert not found


@pytest.mark.parametrize("kind", [each for each in KINDS if each not in ("socket", "huge and sparse")])
def test_a_journal_that_is_no_file_is_named(tmp_path, kind):
    path = tmp_path / "journal.jsonl"
    KINDS[kind](path)
    for call in (lambda: whole_files.read_lines(path), lambda: whole_files.append_line(path, {"a": 1})):
        try:
            assert call() in ([], None) and kind == "loop of links"
        except (UserError, OSError) as error:
            assert str(path) in (error.where if isinstance(error, UserError) else error.filename)


@pytest.mark.parametrize("name", [run_folder.LEDGER, "01-px/rewinds.jsonl"])
def test_a_run_s_pipe_is_found_at_the_start(tmp_path, name):
    class Plan:
        number = 1

        def folder(self, run_dir):
            return run_dir / "01-px"

    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError) as caught:
        run_folder.require_writable(tmp_path, [Plan()])
    assert caught.value.where == str(tmp_path / name)


def test_files_are_read_as_they_are(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\0" * 100)
    (tmp_path / "link").symlink_to(path)
    assert regular_files.read_regular(tmp_path / "link") == regular_files.read_regular(path, 100) == b"\0" * 100
    with pytest.raises(OSError, match="larger than 99"):
        regular_files.read_regular(path, 99)
