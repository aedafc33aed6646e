"""Every key of a configuration that a message names is one that can be set: a hint that is followed must help."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import hdm_lightning
from composed import BASES, base
from hdm_lightning.data.crops import Buckets
from hdm_lightning.training.former_keys import RENAMED

SOURCE = Path(hdm_lightning.__file__).parent
OTHERS = {
    "data.tokenizer",  # of `ShardDataModule` alone
    "autoencoder.config.block_out_channels",  # where a configuration is given
    "logger.trackio",  # of logger=trackio
    "data.captions.tags.group_drop",
    "data.captions.tags.tag_drop",
    "stage.written_at",
    "init.json",
    "model.safetensors",
    "train.log",
}


def keys_below(value, path=""):
    """All keys of a configuration, dotted."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield f"{path}{key}"
        yield from keys_below(inner, f"{path}{key}.")


@pytest.fixture(scope="module")
def keys():
    found = {key for command in BASES for key in keys_below(yaml.safe_load(base(command)))}
    return found | set(RENAMED) | {f"data.crop.buckets.{each.name}" for each in fields(Buckets)}


def messages():
    """The texts of `where` and `hint` of all errors, with their places."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for keyword in node.keywords if isinstance(node, ast.Call) else ():
                if keyword.arg in ("where", "hint"):
                    parts = (each for each in ast.walk(keyword.value) if isinstance(each, ast.Constant))
                    yield from ((f"{path.name}:{each.lineno}", each.value) for each in parts)


def test_the_keys_that_messages_name_can_be_set(keys):
    heads = "|".join(sorted({key.partition(".")[0] for key in keys}))
    dotted = re.compile(rf"(?<![\w./:-])(?:{heads})(?:\.[a-z_0-9]+)+(?![\w(/])")
    named = [(place, key) for place, text in messages() if isinstance(text, str) for key in dotted.findall(text)]
    assert len({key for _, key in named}) > 40
    assert [each for each in named if each[1] not in keys | OTHERS] == []
