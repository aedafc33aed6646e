"""The commands of docs/fine_tuning.md: each composes, or is one that its parser takes."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from composed import of_hydra
from hdm_lightning.cli import convert, sample
from hdm_lightning.datasets import folder, kohya

PAGE = Path(__file__).parents[2] / "docs" / "fine_tuning.md"
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", "").splitlines() if line.strip()]
COMMANDS = [words for line in LINES if (words := shlex.split(line, comments=True))]


def test_the_page_has_commands_of_every_kind():
    kinds = {"hdm-train": 5, "hdm-sample": 3, "hdm-convert": 6, "hdm-shards": 3}
    assert all(sum(command[0] == name for command in COMMANDS) >= least for name, least in kinds.items())


@pytest.mark.parametrize("command", [each for each in COMMANDS if each[0] == "hdm-train"], ids=" ".join)
def test_trainings_compose(command):
    config = of_hydra("train", *command[1:])
    assert config.init == "runs/mine" and list(config.schedule.stages) == ["tune"]
    assert (config.adapter is None) == ("experiment=finetune" in command)


@pytest.mark.parametrize("command", [each for each in COMMANDS if each[0] not in ("hdm-train", "pip")], ids=" ".join)
def test_other_commands_parse(command):
    if command[:2] == ["hdm-shards", "build"]:
        parser = argparse.ArgumentParser()
        {"folder": folder, "kohya": kohya}[command[2]].add_arguments(parser)
        assert parser.parse_args(command[3:]).folder in ("/my/pictures", "/my/class")
        return
    parser = {"hdm-sample": sample.parser, "hdm-convert": convert.parser}[command[0]]()
    parse = getattr(parser, "parse_known_intermixed_args" if command[0] == "hdm-sample" else "parse_known_args")
    assert parse(command[1:])[1] == []
