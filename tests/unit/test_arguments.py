"""Command lines from dataclasses: what is read, what is shown, what is refused and with which hint."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Interval, Lt

from hdm_lightning.cli.arguments import Flags, Parser
from hdm_lightning.errors import UserError


@dataclass(frozen=True)
class Common:
    """What all share.

    Attributes:
        out: file to write; ``-`` is 100% fine.
    """

    out: Path | None = None


@dataclass(frozen=True)
class Job(Common):
    """A job.

    Attributes:
        folder: what to read.
        sides: of the images, in pixels;
            several are taken one after the other.
        batch_size: samples at once.
        rate: share.
        mode: what to do.
        fast, careful: switches.
        limit: None is none.

    Raises:
        mode: nothing of the kind.
    """

    folder: str = "here"
    sides: tuple[Annotated[int, Ge(8)], ...] = (256,)
    batch_size: Annotated[int, Ge(1)] = 4
    rate: Annotated[float, Ge(0), Lt(1)] = 0.5
    mode: Literal["train", "forward"] = "train"
    fast: bool = False
    careful: bool = True
    limit: Annotated[float | None, Interval(gt=0)] = None


@dataclass(frozen=True)
class Needy:
    """Attributes:
    name: is needed.
    """

    name: str


JOB = Flags(Job, {"folder": "FOLDER", "sides": "--resolution PX"})


def given(*arguments, flags=JOB, **options):
    parser = Parser(prog="hdm-x")
    flags.add(parser, **options)
    return flags.read(parser.parse_args(list(arguments)))


def test_nothing_given_is_the_dataclass_itself():
    assert given() == Job()


def test_every_kind_of_field_is_read():
    words = "there --resolution 32 64 --batch-size 8 --rate 0.25 --mode forward --fast --no-careful --limit 2 --out a/b"
    assert given(*words.split()) == Job(Path("a/b"), "there", (32, 64), 8, 0.25, "forward", True, False, 2.0)
    assert given("--limit", "none").limit is None


def test_only_some_fields_get_flags():
    assert given("--rate", "0", only=["rate"]) == Job(rate=0.0)
    with pytest.raises(UserError):
        given("--fast", only=["rate"])


def test_help_is_the_docstring_with_the_defaults():
    parser = Parser(prog="hdm-x")
    JOB.add(parser)
    text = " ".join(parser.format_help().split())
    for part in (
        "--resolution PX [PX ...] of the images, in pixels; several are taken one after the other (default: 256)",
        "--batch-size N samples at once (default: 4)",
        "--mode {train,forward} what to do (default: train)",
        "--fast switches --careful",
        "--out PATH file to write; - is 100% fine",
        "--limit X None is none",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "where", "hint"),
    [
        (["--batch-size", "0"], "--batch-size", "use 1 or more"),
        (["--rate", "1"], "--rate", "use less than 1"),
        (["--resolution", "16", "4"], "--resolution", "use 8 or more"),
        (["--limit", "-1"], "--limit", "use more than 0"),
        (["--batch-size", "many"], "--batch-size", "use one"),
        (["--mode", "trian"], "--mode", "did you mean 'train'?"),
        (["--rsolution", "3"], "hdm-x", "did you mean '--resolution'?"),
        (["a", "b"], "hdm-x", "quote arguments that contain spaces"),
        (["--rate"], "--rate", "hdm-x --help"),
    ],
)
def test_mistakes_name_the_flag_and_what_helps(arguments, where, hint):
    with pytest.raises(UserError) as caught:
        given(*arguments)
    assert caught.value.where == where
    assert hint in caught.value.hint


def test_a_field_without_default_is_required():
    assert given("--name", "x", flags=Flags(Needy)) == Needy("x")
    with pytest.raises(UserError, match="--name"):
        given(flags=Flags(Needy))


def test_mistakes_of_a_part_are_told_by_its_own_options():
    parser = Parser(prog="hdm-x")
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    JOB.add(parts.add_parser("one"), only=["rate"])
    JOB.add(parts.add_parser("two"), only=["batch_size"])
    for arguments, where, hint in [
        (["two", "--batch-sise=1"], "hdm-x two", "did you mean '--batch-size'?"),
        (["tow"], "PART", "did you mean 'two'?"),
        ([], "hdm-x", "--help"),
    ]:
        with pytest.raises(UserError) as caught:
            parser.parse_args(arguments)
        assert caught.value.where == where
        assert hint in caught.value.hint


def test_one_field_changed_by_text():
    assert JOB.changed(Job(), "batch-size=8", where="--against", only=["batch_size"]) == Job(batch_size=8)
    assert JOB.changed(Job(), "fast=yes", where="--against", only=["fast"]) == Job(fast=True)
    for change, hint in [
        ("batch_sise=8", "did you mean 'batch_size'?"),
        ("batch_size", "KEY=VALUE"),
        ("fast=perhaps", "true or false"),
        ("batch_size=0", "1 or more"),
        ("rate=0", "batch_size"),
    ]:
        with pytest.raises(UserError) as caught:
            JOB.changed(Job(), change, where="--against", only=["batch_size", "fast"])
        assert caught.value.where == "--against"
        assert hint in caught.value.hint


def test_a_namespace_of_other_flags_is_left_alone():
    assert Flags(Common).read(argparse.Namespace(part="x", out="a")) == Common(Path("a"))


@dataclass(frozen=True)
class Several:
    """Fields of more than one value.

    Attributes:
        span: low and high.
        size: in pixels; may be repeated.
    """

    span: tuple[float, float] = (0.0, 1.0)
    size: list[str] = field(default_factory=list)


def test_a_pair_takes_two_values_and_a_list_one_each_time():
    found = given("--size", "8x8", "--span", "0.2", "0.8", "--size", "16x8", flags=Flags(Several))
    assert found.span == (0.2, 0.8)
    assert list(found.size) == ["8x8", "16x8"]
    assert list(given(flags=Flags(Several)).size) == []
    with pytest.raises(UserError, match="--span"):
        given("--span", "0.2", flags=Flags(Several))
