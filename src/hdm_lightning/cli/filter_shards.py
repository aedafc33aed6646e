"""hdm-shards filter: keep the samples of shards that satisfy bounds and values, without near duplicates."""

# ruff: noqa: PLC0415 (torch is imported only when the command runs, to keep --help fast)
import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm_lightning.argument_types import named_number, whole_number
from hdm_lightning.cli.command import progress_bars
from hdm_lightning.errors import UserError, import_optional

if TYPE_CHECKING:
    from hdm_lightning.datasets.filter_rules import Filter, Rule
    from hdm_lightning.datasets.filtering import Judgement

NEAR_BITS = 4
"""Default, out of 64 bits: copies that were resized, re-encoded or slightly watermarked differ in fewer."""

MEASURED = "width, height, short_side, long_side, aspect, caption_words, caption_letters"


def filter_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    command.add_argument("shards", metavar="SHARDS", help="folder or pattern of indexed shards")
    to = command.add_mutually_exclusive_group(required=True)
    to.add_argument("--out", type=Path, help="output folder for new shards with the samples that are kept")
    to.add_argument("--mark", action="store_true", help="remove the others from the index (changes the order)")
    to.add_argument("--dry-run", action="store_true", help="report how many would be kept, and stop")
    bound: dict[str, Any] = {"type": named_number, "nargs": "+", "action": "extend", "default": []}
    command.add_argument(
        "--min", metavar="KEY=NUMBER", help=f"lower bound: {MEASURED}, or a key of the records", **bound
    )
    command.add_argument("--max", metavar="KEY=NUMBER", help="upper bound, likewise", **bound)
    value: dict[str, Any] = {**bound, "type": _named_values, "metavar": "KEY=VALUE[,VALUE]"}
    command.add_argument("--is", dest="among", help="allowed values of a key of the records", **value)
    command.add_argument("--is-not", dest="not_among", help="values to reject", **value)
    command.add_argument(
        "--lacking",
        choices=("leave-out", "keep"),
        default="leave-out",
        help="samples whose key is missing or not a number (default %(default)s)",
    )
    command.add_argument(
        "--near-duplicates",
        type=whole_number(0),
        nargs="?",
        const=NEAR_BITS,
        metavar="BITS",
        help=f"leave out near duplicates, whose perceptual hashes differ in up to BITS of 64 bits (BITS: {NEAR_BITS})",
    )
    command.add_argument("--against", nargs="+", metavar="SHARDS", help="other sets; leave out copies of their samples")
    command.add_argument("--jobs", type=whole_number(1), help="parallel reader processes (default: one per core)")


def _named_values(text: str) -> tuple[str, tuple[str, ...]]:
    """Parse KEY=VALUE,VALUE; an argparse type."""
    key, equals, values = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, tuple(value.strip().lower() for value in values.split(","))


def filter_shards(arguments: argparse.Namespace) -> int:
    """Filter, and report how many samples each rule left out."""
    from hdm_lightning.data.parallel import available_cores
    from hdm_lightning.datasets.filtering import FilteredSet
    from hdm_lightning.datasets.journal import REJECTED

    wanted, jobs = _wanted(arguments), arguments.jobs or available_cores()
    made = FilteredSet(arguments.shards, wanted, against=arguments.against or (), jobs=jobs)
    with progress_bars() as report:
        if arguments.out is not None:
            _, judgement = made.write(arguments.out, report)
        else:
            judgement = made.judge(None, report) if arguments.dry_run else made.mark(report)
    for line in told(judgement):
        print(line)
    if not judgement.chosen():
        raise UserError(
            "no sample is kept", where=arguments.shards, hint="relax the bounds; --dry-run shows their effect"
        )
    if arguments.out is not None:
        print(f"  {arguments.out / REJECTED} lists each sample that was left out")
    if arguments.mark:
        print(f"  removed from the index; hdm-shards index {shlex.quote(arguments.shards)} restores them")
    return 0


def _wanted(arguments: argparse.Namespace) -> "Filter":
    from hdm_lightning.datasets.filter_rules import Filter
    from hdm_lightning.datasets.near_duplicates import MOST_BITS

    rules, distance = tuple(_rules(arguments)), arguments.near_duplicates
    if not rules and distance is None:
        raise UserError("no rule is set", where="--min", hint="add one, such as --min short_side=256")
    if arguments.against and distance is None:
        hint = f"add --near-duplicates, optionally with a number of bits (default {NEAR_BITS})"
        raise UserError("other sets are only searched for near duplicates", where="--against", hint=hint)
    if distance is not None:
        import_optional("imagehash", "filter", where="--near-duplicates")
        if distance > MOST_BITS:
            raise UserError(f"is {distance}", where="--near-duplicates", hint=f"use {MOST_BITS} or less")
    return Filter(rules, arguments.lacking == "keep", distance)


def _rules(arguments: argparse.Namespace) -> "Iterator[Rule]":
    from hdm_lightning.datasets.filter_rules import Rule

    for key, number in arguments.min:
        yield Rule(key, least=number)
    for key, number in arguments.max:
        yield Rule(key, most=number)
    for key, values in arguments.among:
        yield Rule(key, among=values)
    for key, values in arguments.not_among:
        yield Rule(key, among=values, wanted=False)


def told(judgement: "Judgement") -> Iterator[str]:
    """Yield a summary line, one per reason, and one per missing key or value of kept samples."""
    from hdm_lightning.printable import in_one_line

    left_out = judgement.left_out
    gone = sum(left_out.values())
    yield f"{judgement.samples:,} samples: {judgement.samples - gone:,} kept, {gone:,} left out"
    for reason, count in left_out.items():
        yield f"  {count:,} left out: {in_one_line(reason)}"
    for what, count in judgement.lacking.items():
        yield f"  {count:,} kept despite: {in_one_line(what)}"
