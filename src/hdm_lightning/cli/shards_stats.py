"""hdm-shards stats."""

import argparse
from pathlib import Path

from hdm_lightning.cli.counts import at_least
from hdm_lightning.cli.outputs import require_picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("places", nargs="+", metavar="FOLDER|PATTERN", help="indexed shards, local or remote")
    parser.add_argument("--tokenizer", help="count captions in tokens of this text encoder (name or folder), not words")
    parser.add_argument(
        "--captions", type=at_least(0), default=2000, help="captions to read, at random (default %(default)s)"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw the histograms into this image")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, draw the histograms."""
    from hdm_lightning.data.inspection import (  # noqa: PLC0415 (as above)
        as_table,
        collect,
        draw,
    )

    if arguments.picture:
        require_picture(Path(arguments.picture), "--picture", more=(".pdf", ".svg"))
    length_of, unit = None, "words"
    if arguments.tokenizer:
        from hdm_lightning.encoders.tokenizer import Tokenizer  # noqa: PLC0415 (only where asked for)

        tokenizer, unit = Tokenizer(arguments.tokenizer, where="--tokenizer").load().bind(4096), "tokens"

        def length_of(caption: str) -> int:
            return tokenizer(caption)[1]

    found = collect(arguments.places, caption_samples=arguments.captions, length_of=length_of, caption_unit=unit)
    print(as_table(found))
    if arguments.picture:
        draw(found, arguments.picture)
    return 0
