"""hdm-challenge: a low-budget benchmark with fixed data, prompts and budgets, open to any model."""

# ruff: noqa: PLC0415 (numpy and torch are imported only by the commands that need them, to keep --help fast)
import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm_lightning.cli.arguments import Parser
from hdm_lightning.cli.command import require_file, require_folder, run_command, table_console
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import write_json, write_text

if TYPE_CHECKING:
    from hdm_lightning.evaluation.challenge_tasks import Task

TASK_NAMES = ("small", "medium", "large")
BOARD_FORMAT = "hdm-lightning leaderboard 1"
REFUSED_STATUS = 1

_DESCRIPTION = """Enter the low-budget challenge, or check its leaderboard.

Train on the task's data within its budget, generate images of its prompts, and enter the folder with its cost.
docs/challenge.md explains the rules."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands and return the exit status."""

    def run() -> int:
        arguments = parser().parse_args(argv)
        return COMMANDS[arguments.command][2](arguments)

    return run_command(run)


_EXAMPLES = """examples:
  hdm-challenge data small --out runs/challenge/shards
  hdm-challenge prompts small --out runs/challenge/prompts.txt
  hdm-challenge enter small --images images --run runs/mine --name mine --by me --board leaderboard.json
  hdm-challenge board leaderboard.json
"""


def parser() -> Parser:
    """Return the parser of all commands."""
    result = Parser(prog="hdm-challenge", description=_DESCRIPTION, epilog=_EXAMPLES)
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return result


def _task_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("task", choices=TASK_NAMES, metavar="TASK", help=", ".join(TASK_NAMES))


def _task(arguments: argparse.Namespace) -> "Task":
    from hdm_lightning.evaluation.challenge_tasks import task_of

    return task_of(arguments.task)


def _tasks(arguments: argparse.Namespace) -> int:
    from hdm_lightning.evaluation.challenge_tasks import TASKS

    del arguments
    for task in TASKS.values():
        prompts = len(task.captions())
        budget = f"{task.operations:.2g} operations, or ${task.usd:.2f}"
        print(f"{task.name:8}{task.about}: {task.scenes:,} scenes, {prompts} prompts, at most {budget}")
    return 0


def _data_arguments(command: argparse.ArgumentParser) -> None:
    _task_argument(command)
    command.add_argument("--out", type=Path, required=True, help="folder for the shards and their index")


def _data(arguments: argparse.Namespace) -> int:
    task = _task(arguments)
    print(f"{task.scenes:,} scenes: {task.build(require_folder(arguments.out, '--out'))}")
    return 0


def _prompts_arguments(command: argparse.ArgumentParser) -> None:
    _task_argument(command)
    command.add_argument("--out", type=Path, required=True, help="output file, one prompt per line")


def _prompts(arguments: argparse.Namespace) -> int:
    captions = _task(arguments).captions()
    write_text(require_file(arguments.out, "--out"), "\n".join(captions) + "\n")
    print(f"{len(captions)} prompts: {arguments.out}")
    return 0


def _enter_arguments(command: argparse.ArgumentParser) -> None:
    _task_argument(command)
    command.add_argument(
        "--images", type=Path, required=True, help="folder of images, numbered from 0000 like the prompts"
    )
    command.add_argument("--name", required=True, help="name of the entry")
    command.add_argument("--by", required=True, help="who enters it")
    command.add_argument("--board", type=Path, required=True, help="leaderboard file, created if missing")
    command.add_argument("--run", type=Path, help="hdm-train run that generated them, whose cost is counted")
    stated = command.add_argument_group("instead of --run, for any other model")
    stated.add_argument("--operations", type=float, help="of all training runs on the task, 2 per multiply-add")
    stated.add_argument("--usd", type=float, help="rental cost of the machine, if operations cannot be counted")
    stated.add_argument("--hours", type=float, help="training time")
    stated.add_argument("--hardware", help="hardware it ran on")
    stated.add_argument("--commit", help="commit of the code, or its URL")
    stated.add_argument("--pretrained", action="append", default=[], help="pretrained network used; repeatable")


def _enter(arguments: argparse.Namespace) -> int:
    from hdm_lightning.evaluation import challenge_entry as entries

    task, board = _task(arguments), _read_board(arguments.board)
    if any((one.get("task"), one.get("name")) == (task.name, arguments.name) for one in board["entries"]):
        what = f"entry {arguments.name!r} already exists for the task {task.name}"
        raise UserError(what, where="--name", hint="choose another name")
    paths = entries.numbered_images(arguments.images, task)
    images = entries.read_images(paths, task)
    cost, maker = _counted(arguments, task, paths) if arguments.run else _stated(arguments)
    entry = json.loads(json.dumps(entries.make_entry(arguments.name, task, images, cost, maker)))
    board["entries"].append(entry)
    if reasons := entries.judged(board["entries"])[-1][1]:
        hint = "docs/challenge.md has the rules"
        raise UserError("is rejected: " + "; ".join(reasons), where=arguments.name, hint=hint)
    write_json(require_file(arguments.board, "--board"), board)
    return _show(board)


def _counted(arguments: argparse.Namespace, task: "Task", paths: Sequence[Path]) -> tuple[Any, Any]:
    """Return the cost and maker of an hdm-train run; raise UserError unless it generated the images."""
    from hdm_lightning.evaluation.challenge_cost import count_run
    from hdm_lightning.evaluation.challenge_entry import Maker, require_by_the_rules
    from hdm_lightning.training.run_folder import read_environment

    stated = ("operations", "usd", "hours", "hardware", "pretrained")
    given = [name for name in stated if getattr(arguments, name) not in (None, [])]
    if given:
        raise UserError("is counted from the run", where=f"--{given[0]}", hint="omit it, or omit --run")
    run = count_run(arguments.run, task)
    require_by_the_rules(paths, task, run)
    commit = arguments.commit or read_environment(arguments.run).get("commit")
    if not commit:
        what = "is required: the run has no commit, because it was not made from a git checkout"
        raise UserError(what, where="--commit", hint="name the version of the code, or its address")
    return run.cost, Maker(arguments.by, commit, run.pretrained, run.weights, run.settings)


def _stated(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the cost and maker as stated by the entrant."""
    from hdm_lightning.evaluation.challenge_cost import Cost
    from hdm_lightning.evaluation.challenge_entry import Maker

    for name in ("hours", "hardware", "commit"):
        if getattr(arguments, name) is None:
            raise UserError("is required without --run", where=f"--{name}", hint="see hdm-challenge enter --help")
    cost = Cost(arguments.operations, arguments.usd, arguments.hours, arguments.hardware, "entrant")
    return cost, Maker(arguments.by, arguments.commit, tuple(arguments.pretrained))


def _board_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("board", type=Path, metavar="FILE", help="leaderboard")
    command.add_argument("--images", type=Path, help="folder of one entry's images, to regrade them")
    command.add_argument("--name", help="name of that entry")
    command.add_argument("--task", choices=TASK_NAMES, help="task of that entry, if the name is used in several tasks")


def _board(arguments: argparse.Namespace) -> int:
    """Recheck every entry and show the leaderboard; return 1 if an entry is rejected."""
    if not arguments.board.is_file():
        raise UserError("does not exist", where=str(arguments.board), hint="use a file that `enter --board` wrote")
    board = _read_board(arguments.board)
    if (arguments.images is None) != (arguments.name is None):
        raise UserError("go together", where="--images, --name", hint="use both or neither")
    if arguments.task is not None and arguments.images is None:
        raise UserError("is only for regrading images", where="--task", hint="add --images and --name")
    if arguments.images is not None:
        _grade_again(_entry_of(board, arguments.name, arguments.task), arguments.images)
    return _show(board)


def _entry_of(board: dict[str, Any], name: str, task: str | None) -> dict[str, Any]:
    """Return the entry with a name, and a task if the name is used in several."""
    mine = [one for one in board["entries"] if one.get("name") == name and task in (None, one.get("task"))]
    if not mine:
        of = f" for the task {task}" if task else ""
        raise UserError(f"there is no entry {name!r}{of}", where="--name", hint="see hdm-challenge board FILE")
    if len(mine) > 1:
        tasks = ", ".join(in_one_line(one.get("task")) for one in mine)
        raise UserError(f"{len(mine)} entries are named {name!r}", where="--name", hint=f"add --task: {tasks}")
    return mine[0]


def _grade_again(entry: dict[str, Any], folder: Path) -> None:
    from hdm_lightning.evaluation import challenge_entry as entries
    from hdm_lightning.evaluation.challenge_tasks import task_of

    name = str(entry.get("name"))
    if reasons := entries.refusals(entry):
        raise UserError("is rejected: " + "; ".join(reasons), where=name, hint="docs/challenge.md has the rules")
    task = task_of(entry["task"])
    images = entries.read_images(entries.numbered_images(folder, task), task)
    if reasons := entries.differs_from_images(entry, images):
        raise UserError("; ".join(reasons), where=name, hint="use the folder that was entered")


def _read_board(path: Path) -> dict[str, Any]:
    from hdm_lightning.json_files import read_object

    if not path.is_file():
        return {"format": BOARD_FORMAT, "entries": []}
    board = read_object(path)
    entries = board.get("entries")
    whole = isinstance(entries, list) and all(isinstance(one, dict) for one in entries)
    if board.get("format") != BOARD_FORMAT or not whole:
        raise UserError("is not a leaderboard", where=str(path), hint="use a file that `enter --board` wrote")
    return board


def _show(board: dict[str, Any]) -> int:
    """Print a table per task, best first, then the rejected entries; return the exit status."""
    from rich.markup import escape
    from rich.table import Table

    from hdm_lightning.evaluation.challenge_entry import judged

    console, status, found = table_console(140), 0, judged(board["entries"])
    for name in TASK_NAMES:
        mine = [entry for entry, reasons in found if not reasons and entry["task"] == name]
        if not mine:
            continue
        table = Table(
            "", "entry", "all correct, unseen", "95% interval", "operations", "rent", "hours", "hardware", "stated by"
        )
        table.title = f"{name}: overlapping intervals do not establish a ranking"
        for place, entry in enumerate(sorted(mine, key=lambda one: -one["scores"]["headline"]["value"]), start=1):
            table.add_row(str(place), *(escape(in_one_line(cell)) for cell in _row(entry)))
        console.print(table)
    for entry, reasons in found:
        if reasons:
            status = REFUSED_STATUS
            print(in_one_line(f"rejected: {entry.get('name')!r}: {'; '.join(reasons)}"), file=sys.stderr)
    return status


def _row(entry: Mapping[str, Any]) -> list[str]:
    score, cost = entry["scores"]["headline"], entry["cost"]
    operations = "" if cost["operations"] is None else f"{cost['operations']:.3g}"
    rent = "" if cost["usd"] is None else f"${cost['usd']:.2f}"
    interval = f"{score['low']:.1%} to {score['high']:.1%}"
    made = (operations, rent, f"{cost['hours']:.2f}", cost["hardware"], cost["told_by"])
    return [entry["name"], f"{score['value']:.1%}", interval, *made]


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "tasks": ("the tasks and their budgets", lambda command: None, _tasks),
    "data": ("generate a task's training set", _data_arguments, _data),
    "prompts": ("write a task's prompts", _prompts_arguments, _prompts),
    "enter": ("score a folder of images and add it to a leaderboard", _enter_arguments, _enter),
    "board": ("recheck every entry and show a leaderboard", _board_arguments, _board),
}
"""Name → help, function that adds the arguments, function that runs the command."""


if __name__ == "__main__":
    raise SystemExit(main())
