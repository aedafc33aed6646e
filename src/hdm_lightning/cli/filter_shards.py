"""hdm-shards filter: the samples of shards that keep bounds and values, without near copies."""

# ruff: noqa: PLC0415 (what loads torch is loaded when the command runs, for --help's sake)
import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm_lightning.cli.command import at_least, named_number, progress_bars
from hdm_lightning.errors import UserError, import_optional

if TYPE_CHECKING:
    from hdm_lightning.datasets.filter_judging import Filter
    from hdm_lightning.datasets.filter_rules import Rule
    from hdm_lightning.datasets.filtering import Judgement

NEAR_BITS = 4
"""Of 64: copies that were resized, encoded again or given a small mark differ in fewer."""

MEASURED = "width, height, short_side, long_side, aspect, caption_words, caption_letters"


def filter_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    command.add_argument("shards", metavar="SHARDS", help="folder or pattern of indexed shards")
    to = command.add_mutually_exclusive_group(required=True)
    to.add_argument("--out", type=Path, help="folder that gets new shards of the samples that stay")
    to.add_argument("--mark", action="store_true", help="leave the others out of the index (changes the order)")
    to.add_argument("--dry-run", action="store_true", help="say how many would stay, and stop")
    bound: dict[str, Any] = {"type": named_number, "nargs": "+", "action": "extend", "default": []}
    command.add_argument("--min", metavar="KEY=NUMBER", help=f"{MEASURED}, or a key of the records", **bound)
    command.add_argument("--max", metavar="KEY=NUMBER", help="the same", **bound)
    value: dict[str, Any] = {**bound, "type": _named_values, "metavar": "KEY=VALUE[,VALUE]"}
    command.add_argument("--is", dest="among", help="values that a key of the records must have", **value)
    command.add_argument("--is-not", dest="not_among", help="values that it must not have", **value)
    command.add_argument(
        "--lacking",
        choices=("leave-out", "keep"),
        default="leave-out",
        help="samples without a key, or whose value is no number (default %(default)s)",
    )
    command.add_argument(
        "--near-duplicates",
        type=at_least(0),
        nargs="?",
        const=NEAR_BITS,
        metavar="BITS",
        help=f"leave out near copies, whose perceptual hashes differ in so many of 64 bits (no number: {NEAR_BITS})",
    )
    command.add_argument("--against", nargs="+", metavar="SHARDS", help="other sets, of which no copies are to stay")
    command.add_argument("--jobs", type=at_least(1), help="processes that read side by side (default: one a core)")


def _named_values(text: str) -> tuple[str, tuple[str, ...]]:
    """An argparse type: KEY=VALUE,VALUE."""
    key, equals, values = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE")
    return key, tuple(value.strip().lower() for value in values.split(","))


def filter_shards(arguments: argparse.Namespace) -> int:
    """Filter, and tell how many samples each rule has left out."""
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
            "no sample stays", where=arguments.shards, hint="give other bounds; --dry-run tells their effect"
        )
    if arguments.out is not None:
        print(f"  {arguments.out / REJECTED} names each sample that is left out: {arguments.out}")
    if arguments.mark:
        print(f"  they are out of the index; hdm-shards index {arguments.shards} takes them in again")
    return 0


def _wanted(arguments: argparse.Namespace) -> "Filter":
    from hdm_lightning.datasets.filter_judging import Filter
    from hdm_lightning.datasets.near_duplicates import MOST_BITS

    rules, distance = tuple(_rules(arguments)), arguments.near_duplicates
    if not rules and distance is None:
        raise UserError("there is no rule", where="--min", hint="give one, such as --min short_side=256")
    if arguments.against and distance is None:
        hint = f"add --near-duplicates, perhaps with a number of bits (default {NEAR_BITS})"
        raise UserError("other sets are compared by near copies alone", where="--against", hint=hint)
    if distance is not None:
        import_optional("imagehash", "filter", where="--near-duplicates")
        if distance > MOST_BITS:
            raise UserError(f"is {distance}", where="--near-duplicates", hint=f"give {MOST_BITS} at most")
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
    """A line of all, one a reason, and one for each thing that samples lack which stay."""
    from hdm_lightning.printable import in_one_line

    left_out = judgement.left_out
    gone = sum(left_out.values())
    yield f"{judgement.samples:,} samples: {judgement.samples - gone:,} stay, {gone:,} are left out"
    for reason, count in left_out.items():
        yield f"  {count:,} left out: {in_one_line(reason)}"
    for what, count in judgement.lacking.items():
        yield f"  {count:,} stay though they lack it: {in_one_line(what)}"
