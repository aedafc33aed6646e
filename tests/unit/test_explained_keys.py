"""`--explain`: every key of every command is described, and what is said agrees with what is checked."""

from typing import get_type_hints

import pytest
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from hdm_lightning.cli.conf_comments import first_paragraph
from hdm_lightning.cli.docstrings import find, parameters
from hdm_lightning.cli.explained import Reference, explain, referenced
from hdm_lightning.errors import UserError
from hdm_lightning.training.stages import StageSettings

COMMANDS = [
    ("train", []),
    ("train", ["experiment=lora", "init=x", "optimizer=muon", "logger=many_loggers", "trainer=gpu"]),
    ("train_vae", ["optimizer=adamw8bit"]),
    ("plan", []),
    ("plan_autoencoder", []),
    ("demo", []),
]


def keys(node, above=""):
    for name, value in node.items():
        yield f"{above}{name}"
        if isinstance(value, dict):
            yield from keys(value, f"{above}{name}.")


@pytest.mark.parametrize(
    ("head", "summary"),
    [
        ("# @package hydra\n# One folder\n# per run.\n", "One folder per run."),
        (
            "# @package _global_\n# Needs 0.3 GB and config.json. Use it:\n#   hdm-plan\n",
            "Needs 0.3 GB and config.json.",
        ),
        ("# Needs 0.3 GB; with config.json:\n#   hdm-plan\n", "Needs 0.3 GB"),
        ("# Needs 0.3 GB in config.json:\n#   hdm-plan\n", "Needs 0.3 GB in config.json"),
        ("key: 1\n", ""),
    ],
)
def test_the_summary_of_a_file_ends_where_its_command_begins(head, summary):
    assert first_paragraph(head) == summary


@pytest.mark.parametrize(("name", "overrides"), COMMANDS, ids=lambda each: " ".join(each) if each else "")
def test_every_key_is_described(name, overrides):
    reference: Reference = referenced(name, overrides)
    every = list(keys(OmegaConf.to_container(reference.config, resolve=False)))
    assert len(every) > 15
    assert [key for key in every if not reference.meaning(key)] == []


def test_what_a_key_takes_is_what_is_accepted():
    """The limits read from the source text are those that pydantic holds values to."""
    told = {name: taken.kind() for name, taken in parameters(find(f"{StageSettings.__module__}.StageSettings")).items()}
    hints = get_type_hints(StageSettings, include_extras=True)
    at_bounds = {
        "a whole number above 0": ([1], [0]),
        "a whole number 0 or more": ([0], [-1]),
        "a number above 0": ([0.1], [0]),
        "a number 0 or more": ([0], [-0.1]),
        "a number 0 or more and below 1": ([0, 0.99], [1, -0.1]),
        "a number from 0 to 1": ([0, 1], [1.01, -0.01]),
        "true or false": ([True, False], ["maybe"]),
    }
    tried = set()
    for name, kind in told.items():
        for good, bad in [at_bounds[kind]] if kind in at_bounds else ():
            adapter = TypeAdapter(hints[name])
            assert [adapter.validate_python(value) for value in good] == good
            for value in bad:
                with pytest.raises(ValidationError):
                    adapter.validate_python(value)
            tried.add(kind)
    assert len(tried) >= 6


def test_a_value_its_place_and_its_stage_are_told():
    text = explain(["schedule.stages.px512.samples", "optimizer.betas", "experiment=evening_gpu"], "train")
    assert "no such" not in text and "follows: schedule.stages.NAME.betas" in text
    with pytest.raises(UserError) as raised:
        explain(["schedule.stages.px256.smaples"], "train")
    assert "schedule.stages.px256.samples" in raised.value.hint
    assert "px128.samples = 400000\n" in explain(["schedule.stages.px128.samples", "experiment=evening_gpu"], "train")


def test_keys_that_are_not_set_are_known_by_what_takes_them():
    text = explain(["data.crop.buckets.step_px", "trainer.profiler", "data.seed"], "train")
    assert "takes: a whole number; 64 if not set" in text and "trainer.profiler (not set)" in text
    assert "data.seed = ${seed}" in text and "follows: seed" in text


def test_groups_tell_their_choices():
    text = explain(["optimizer", "experiment"], "train")
    assert all(f"\n    {choice} " in text for choice in ("optimizer=muon", "experiment=weekend_24gb"))


@pytest.mark.parametrize("key", ["adapter.rank", "adapter.factor", "optimizer.rounds", "logger.wandb.project"])
def test_a_key_of_another_choice_is_described_where_the_hint_points(key):
    """What the hint says to ask is asked, and answers."""
    with pytest.raises(UserError) as raised:
        explain([key], "train")
    _, _, asked = raised.value.hint.partition("--explain ")
    assert f"\n{key}" in "\n" + explain(asked.split(), "train")
