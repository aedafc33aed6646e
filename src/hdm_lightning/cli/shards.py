"""hdm-shards: build, index, verify, look at and count WebDataset shards."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from hdm_lightning.cli.command import run_command

BUILDERS = {
    "folder": "images with captions beside them",
    "kohya": "a folder laid out for kohya's trainers: 10_name/, tags in captions",
    "img2dataset": "img2dataset's output as it is (CC12M, COYO-700M, …)",
    "openclipart": "the Open Clip Art collection",
    "shapes": "synthetic scenes with known answers",
}
COMMANDS = {
    "build": "make shards from a source",
    "index": "write index.json: samples, bytes, sha256 of each shard",
    "verify": "compare shards with their index; decode every sample",
    "stats": "count samples, sizes, shapes and caption lengths",
    "show": "a contact sheet of samples as training sees them",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["build"] and words[1:2] and words[1] in BUILDERS:
        return _build(words[1], words[2:])
    arguments = parser().parse_args(words)
    module = import_module(f"hdm_lightning.cli.shards_{arguments.command}")
    return run_command(lambda: int(module.run(arguments)))


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands but the options of a builder."""
    result = argparse.ArgumentParser(prog="hdm-shards", description="Make and check WebDataset shards.")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == "build":
            _describe_builders(command)
        else:
            import_module(f"hdm_lightning.cli.shards_{name}").add_arguments(command)
    return result


def _describe_builders(command: argparse.ArgumentParser) -> None:
    lines = "\n".join(f"  {name:12} {text}" for name, text in BUILDERS.items())
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = f"sources:\n{lines}\n\n`hdm-shards build SOURCE --help` lists the options of a source."
    command.add_argument("source", choices=BUILDERS, metavar="SOURCE", help="one of those below")


def _build(source: str, words: Sequence[str]) -> int:
    # Only the builder that is asked for is loaded: some need packages that others do not.
    builder = import_module(f"hdm_lightning.datasets.{source}")
    options = argparse.ArgumentParser(
        prog=f"hdm-shards build {source}", description=f"Build shards: {BUILDERS[source]}."
    )
    builder.add_arguments(options)
    arguments = options.parse_args(words)
    return run_command(lambda: int(builder.run(arguments)))
