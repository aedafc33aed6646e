"""hdm-shards: build, caption, encode, filter, index, verify, count and show WebDataset shards."""

# ruff: noqa: PLC0415 (torch is imported only by the commands that need it, to keep --help fast)
import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from hdm_lightning.argument_types import named_number, whole_number
from hdm_lightning.cli.arguments import Parser
from hdm_lightning.cli.caption_shards import caption, caption_arguments
from hdm_lightning.cli.command import require_file, require_picture, run_command
from hdm_lightning.cli.encode_shards import encode, encode_arguments, encode_captions, encode_captions_arguments
from hdm_lightning.cli.filter_shards import filter_arguments, filter_shards
from hdm_lightning.errors import UserError

if TYPE_CHECKING:
    from hdm_lightning.data.index import Index
    from hdm_lightning.data.samples import Tokenize

BUILDERS = {
    "folder": "images with captions beside them",
    "kohya": "a folder in the layout of kohya's trainers: 10_name/, tags in captions",
    "img2dataset": "img2dataset's output as it is (CC12M, COYO-700M, …)",
    "parquet": "parquet files with an image column",
    "hub": "a data set on the hub, or a folder in its layout",
    "openclipart": "the Open Clip Art collection",
    "shapes": "synthetic scenes of known shapes",
}

_EXAMPLES = """examples:
  hdm-shards build folder my/pictures --out my/shards
  hdm-shards stats my/shards
  hdm-shards show my/shards --out sheet.png
  hdm-shards caption my/shards --model OWNER/NAME --prompt long --out my/captioned
  hdm-shards filter my/shards --dry-run --min short_side=256 --max aspect=3
  hdm-shards encode my/shards --out my/latents --vae NAME --resolution 256
  hdm-shards build folder --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: int(read(words)()))


def read(words: Sequence[str]) -> Callable[[], int]:
    """Parse a command line and return the function to call.

    Raises:
        UserError: the arguments are invalid.
    """
    if words[:1] == ["build"] and words[1:2] and words[1] in BUILDERS:
        return _build(words[1], words[2:])
    arguments = parser().parse_args(words)
    return partial(COMMANDS[arguments.command][2], arguments)


def parser() -> Parser:
    """Return the parser of all commands, without the builders' own options."""
    result = Parser(prog="hdm-shards", description="Build, prepare and check WebDataset shards.", epilog=_EXAMPLES)
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return result


def _build_arguments(command: argparse.ArgumentParser) -> None:
    lines = "\n".join(f"  {name:12} {text}" for name, text in BUILDERS.items())
    command.epilog = f"sources:\n{lines}\n\n`hdm-shards build SOURCE --help` lists the options of a source."
    command.add_argument("source", choices=BUILDERS, metavar="SOURCE", help="one of the sources below")


def _build(source: str, words: Sequence[str]) -> Callable[[], int]:
    # Import only the requested builder: some need packages that others do not.
    builder = import_module(f"hdm_lightning.datasets.{source}")
    options = Parser(prog=f"hdm-shards build {source}", description=f"Build shards: {BUILDERS[source]}.")
    builder.add_arguments(options)
    return partial(builder.run, options.parse_args(words))


def _places(command: argparse.ArgumentParser, text: str = "indexed shards, local or remote") -> None:
    command.add_argument("places", nargs="+", metavar="FOLDER|PATTERN", help=text)


def _jobs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--jobs", type=whole_number(1), default=1, help="parallel reader processes (default 1)")


def _index_arguments(command: argparse.ArgumentParser) -> None:
    _places(command, "local folders, or remote shards")
    command.add_argument("--out", help="index file for remote shards (for local shards it is next to them)")
    command.add_argument("--new-only", action="store_true", help="reuse the index entries of unchanged local shards")
    command.add_argument("--follow-links", action="store_true", help="also follow symbolic links to folders")
    _jobs(command)


def _index(arguments: argparse.Namespace) -> int:
    """Index and print one line per folder."""
    from hdm_lightning.data.scanning import index_remote, index_shards
    from hdm_lightning.data.shard_bytes import is_local

    remote = [place for place in arguments.places if not is_local(place)]
    if remote and (not arguments.out or len(remote) < len(arguments.places)):
        raise UserError("remote shards need their own index file", where="--out", hint="list them alone, with --out")
    if arguments.out and not remote:
        raise UserError("the index of local shards is next to them", where="--out", hint="omit it")
    for name in ("new_only", "follow_links") if remote else ():
        if getattr(arguments, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError("is for local folders; remote shards are listed one by one", where=flag, hint="omit it")
    if remote:
        require_file(Path(arguments.out), "--out")
        with _shard_bar() as show:
            index = index_remote(remote, arguments.out, jobs=arguments.jobs, progress=show)
        _print_index(index, arguments.out)
        return 0
    for folder in arguments.places:
        with _shard_bar() as show:
            index = index_shards(
                folder,
                jobs=arguments.jobs,
                new_only=arguments.new_only,
                follow_links=arguments.follow_links,
                progress=show,
            )
        _print_index(index, folder)
    return 0


@contextmanager
def _shard_bar() -> Iterator[Callable[[object], None]]:
    """Show the number of finished shards, on a terminal."""
    from hdm_lightning.data.parallel import progress_bar

    done = count(1)
    with progress_bar("shards", None) as show:
        yield lambda record: show(next(done))


def _print_index(index: "Index", place: str) -> None:
    """Print the samples found and what is unusable.

    Raises:
        UserError: there are no usable samples.
    """
    from hdm_lightning.data.index_report import require_samples, told
    from hdm_lightning.data.shard_files import find_shards

    folder = Path(index.base)
    for line in told(index, place, find_shards(folder).others if folder.is_dir() else {}):
        print(line)
    require_samples(index, place)


def _verify_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", help="local folder with shards and index.json")
    command.add_argument("--decode", action="store_true", help="also decode every sample and read its caption")
    command.add_argument("--allow-missing", action="store_true", help="accept samples without a caption")
    command.add_argument(
        "--mark", action="store_true", help="remove bad samples and missing shards from the index (changes the order)"
    )
    _jobs(command)


def _verify(arguments: argparse.Namespace) -> int:
    """Verify and print one line per problem; return 1 if there is one. Raises UserError: the index has no samples."""
    from hdm_lightning.data.captions import CaptionRules
    from hdm_lightning.data.index import load_index
    from hdm_lightning.data.index_report import left_out, require_samples
    from hdm_lightning.data.parallel import progress_bar
    from hdm_lightning.data.verification import leave_out, verify
    from hdm_lightning.printable import in_one_line

    before = load_index(arguments.folder)
    with progress_bar("shards", len(before.shards)) as show:
        problems = verify(
            arguments.folder,
            decode=arguments.decode or arguments.mark,
            captions=CaptionRules(allow_missing=arguments.allow_missing),
            jobs=arguments.jobs,
            progress=show,
        )
    for problem in problems:
        print(problem)
    if arguments.mark:
        index = leave_out(arguments.folder, problems)
        print(f"{before.samples - index.samples} samples left out, {index.samples} remain")
    unused = left_out(before.shards)
    if unused:
        (reason, _), *others = unused.most_common()
        more = f" and {len(others)} other reasons" if others else ""
        print(f"{unused.total()} samples are left out of the index: {in_one_line(reason)}{more}")
    print(f"{len(problems)} problems")
    require_samples(before, arguments.folder)
    return 1 if problems else 0


def _stats_arguments(command: argparse.ArgumentParser) -> None:
    _places(command)
    command.add_argument(
        "--tokenizer", help="count captions in tokens of this text encoder (name or folder), not words"
    )
    command.add_argument(
        "--captions", type=whole_number(0), default=2000, help="random captions to read (default %(default)s)"
    )
    command.add_argument("--fields", nargs="+", metavar="KEY", help="additional caption keys of the records")
    command.add_argument("--picture", metavar="FILE", help="plot the histograms to this image")


def _stats(arguments: argparse.Namespace) -> int:
    """Print the table and plot the histograms."""
    from hdm_lightning.data.captions import CaptionRules
    from hdm_lightning.data.inspection import as_table, collect, draw
    from hdm_lightning.data.shards_on_disk import unindexed

    if arguments.picture:
        require_picture(Path(arguments.picture), "--picture", more=(".pdf", ".svg"))
    tokenize, unit = _tokenize(arguments.tokenizer, 4096), "tokens" if arguments.tokenizer else "words"
    found = collect(
        arguments.places,
        captions=CaptionRules(fields=(*CaptionRules.fields, *(arguments.fields or ()))),
        caption_samples=arguments.captions,
        length_of=lambda caption: tokenize(caption)[1],
        caption_unit=unit,
    )
    print(as_table(found))
    for line in unindexed(arguments.places):
        print(line)
    if arguments.picture:
        draw(found, arguments.picture)
    return 0


def _show_arguments(command: argparse.ArgumentParser) -> None:
    _places(command)
    command.add_argument("--out", required=True, metavar="FILE", help="image to write")
    command.add_argument(
        "--resolution", type=whole_number(1), default=256, help="side of the crop in pixels (default %(default)s)"
    )
    command.add_argument("--count", type=whole_number(1), default=20)
    command.add_argument("--columns", type=whole_number(1), default=5)
    command.add_argument("--start", type=whole_number(0), default=0, help="position in the order to start at")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--stage", default="", help="stage whose order is shown")
    command.add_argument("--flip", action="store_true", help="flip half of the samples horizontally")
    command.add_argument("--tags", action="store_true", help="shuffle and drop tags (kept ||| tag $$ tag %%%% tag)")
    command.add_argument(
        "--positions", choices=("area", "long_side"), default="area", help="like the model's (default %(default)s)"
    )
    command.add_argument("--drop", type=float, default=0.1, help="share of empty captions (default %(default)s)")
    command.add_argument(
        "--kinds", type=named_number, nargs="+", metavar="KIND=WEIGHT", help="weights of the kinds of captions"
    )
    command.add_argument("--tokenizer", help="count captions in tokens of this text encoder (name or folder)")
    command.add_argument("--context-length", type=whole_number(1), default=256)


def _show(arguments: argparse.Namespace) -> int:
    """Render the contact sheet."""
    from hdm_lightning.data.captions import CaptionRules, TagGrammar
    from hdm_lightning.data.crops import CropRules
    from hdm_lightning.data.inspection import preview
    from hdm_lightning.data.rules import Source, StreamConfig
    from hdm_lightning.data.sample_plan import Plan
    from hdm_lightning.data.samples import stream
    from hdm_lightning.generation.contact_sheet import contact_sheet

    require_picture(Path(arguments.out), "--out")
    config = StreamConfig(
        sources=(Source(tuple(arguments.places)),),
        resolution=arguments.resolution,
        context_length=arguments.context_length,
        seed=arguments.seed,
        stage=arguments.stage,
        crop=CropRules(flip=arguments.flip),
        captions=CaptionRules(
            drop=arguments.drop,
            kinds=dict(arguments.kinds) if arguments.kinds else None,
            tags=TagGrammar() if arguments.tags else None,
        ),
        max_bad_share=1.0,
    )
    tokenize, plan = _tokenize(arguments.tokenizer, arguments.context_length), Plan(config)
    plan.require_images("FOLDER|PATTERN")
    stop = arguments.start + arguments.count
    samples = list(stream(config, tokenize, start=arguments.start, stop=stop, plan=plan))
    images, texts = zip(*(preview(sample, arguments.positions) for sample in samples), strict=True)
    contact_sheet(images, texts, columns=arguments.columns, caption_lines=6).save(arguments.out)
    print(f"{len(samples)} samples: {arguments.out}")
    return 0


def _tokenize(encoder: str | None, length: int) -> "Tokenize":
    """Return the tokenizer of a text encoder, or one that counts words."""
    if not encoder:
        return lambda caption: ([0] * len(caption.split()), len(caption.split()))
    from hdm_lightning.encoders.tokenizer import Tokenizer

    return Tokenizer(encoder, where="--tokenizer").load().bind(length)


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "build": ("build shards from a source", _build_arguments, lambda arguments: _build(arguments.source, [])()),
    "caption": ("add captions from a vision-language model", caption_arguments, caption),
    "encode": ("encode images to latents, to train without an autoencoder", encode_arguments, encode),
    "encode-captions": (
        "encode captions to text-encoder states, to train without a text encoder",
        encode_captions_arguments,
        encode_captions,
    ),
    "filter": ("keep samples within bounds, without near duplicates", filter_arguments, filter_shards),
    "index": ("write index.json: samples, bytes and sha256 of each shard", _index_arguments, _index),
    "verify": ("check shards against their index; decode every sample", _verify_arguments, _verify),
    "stats": ("count samples, sizes, shapes and caption lengths", _stats_arguments, _stats),
    "show": ("render a contact sheet of samples as training sees them", _show_arguments, _show),
}
"""Name → help, function that adds the arguments, function that runs the command."""


if __name__ == "__main__":
    raise SystemExit(main())
