"""Shards come whole or not at all, with the same bytes for the same samples."""

import hashlib
import json
import tarfile

import pytest

from hdm_lightning.datasets.writer import require_no_shards, write_shard
from hdm_lightning.errors import UserError


def write_one(folder):
    fields = {"webp": bytes([4]), "txt": "café 4", "json": {"b": 4, "a": "é"}}
    write_shard(folder / "x.tar", {"0003": {"txt": ""}, "0004": fields})
    return folder / "x.tar"


def test_members_and_contents(tmp_path):
    with tarfile.open(write_one(tmp_path)) as tar:
        assert tar.getnames() == ["0003.txt", "0004.webp", "0004.txt", "0004.json"]
        assert tar.extractfile("0004.webp").read() == bytes([4])
        assert tar.extractfile("0004.txt").read().decode() == "café 4"
        assert json.loads(tar.extractfile("0004.json").read()) == {"a": "é", "b": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_same_samples_same_bytes(tmp_path):
    digests = {hashlib.sha256(write_one(tmp_path / name).read_bytes()).hexdigest() for name in ("one", "two")}
    assert len(digests) == 1


def test_a_failure_leaves_the_former_shard(tmp_path):
    before = write_one(tmp_path).read_bytes()
    with pytest.raises(TypeError):
        write_shard(tmp_path / "x.tar", {"0": {"txt": "a"}, "1": {"json": {"a": object()}}})
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    assert (tmp_path / "x.tar").read_bytes() == before


def test_a_folder_with_shards_is_refused(tmp_path):
    require_no_shards(tmp_path)
    write_one(tmp_path)
    with pytest.raises(UserError, match="already holds"):
        require_no_shards(tmp_path)


def test_a_folder_with_shards_below_it_is_refused_but_for_named_ones(tmp_path):
    (tmp_path / "256px").mkdir()
    write_one(tmp_path / "256px")
    with pytest.raises(UserError, match="already holds"):
        require_no_shards(tmp_path)
    require_no_shards(tmp_path, but=["256px"])
    require_no_shards(tmp_path / "new")


@pytest.mark.parametrize("key", ["a.b", "a/b", ""])
def test_keys_that_a_reader_would_split_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="key is"):
        write_shard(tmp_path / "s.tar", {key: {"txt": "a"}})
    assert not list(tmp_path.iterdir())
