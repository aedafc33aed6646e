"""Shards come whole or not at all, with the same bytes for the same samples."""

import hashlib
import json
import tarfile

import pytest

from hdm_lightning.datasets.writer import ShardWriter, write_shard
from hdm_lightning.errors import UserError


def write_five(folder):
    with ShardWriter(folder, samples_per_shard=2, prefix="x") as writer:
        for i in range(5):
            writer.write(f"{i:04d}", {"webp": bytes([i]), "txt": f"café {i}", "json": {"b": i, "a": "é"}})


def test_members_contents_and_split(tmp_path):
    write_five(tmp_path)
    shards = sorted(tmp_path.glob("*.tar"))
    assert [p.name for p in shards] == ["x-00000.tar", "x-00001.tar", "x-00002.tar"]
    assert not list(tmp_path.glob(".*.part"))
    with tarfile.open(shards[2]) as tar:
        assert tar.getnames() == ["0004.webp", "0004.txt", "0004.json"]
        assert tar.extractfile("0004.webp").read() == bytes([4])
        assert tar.extractfile("0004.txt").read().decode() == "café 4"
        assert json.loads(tar.extractfile("0004.json").read()) == {"a": "é", "b": 4}


def test_same_samples_same_bytes(tmp_path):
    digests = []
    for name in ("one", "two"):
        write_five(tmp_path / name)
        shards = sorted((tmp_path / name).glob("*.tar"))
        digests.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in shards])
    assert digests[0] == digests[1]


def test_a_failure_leaves_whole_shards_only(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for i in range(3):
            writer.write(str(i), {"txt": "a"})
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["shard-00000.tar"]


def test_a_folder_with_shards_is_refused(tmp_path):
    write_five(tmp_path)
    with pytest.raises(UserError, match="already holds"):
        write_five(tmp_path)


@pytest.mark.parametrize("key", ["a.b", "a/b", ""])
def test_keys_that_a_reader_would_split_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="key is"):
        write_shard(tmp_path / "s.tar", {key: {"txt": "a"}})
    assert not list(tmp_path.iterdir())
