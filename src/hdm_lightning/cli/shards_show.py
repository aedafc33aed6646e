"""hdm-shards show."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hdm_lightning.cli.counts import at_least
from hdm_lightning.cli.outputs import require_picture

if TYPE_CHECKING:
    from hdm_lightning.data.samples import Tokenize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("places", nargs="+", metavar="FOLDER|PATTERN", help="indexed shards, local or remote")
    parser.add_argument("--out", required=True, metavar="FILE", help="image to write")
    parser.add_argument(
        "--resolution", type=at_least(1), default=256, help="side of the crop in pixels (default %(default)s)"
    )
    parser.add_argument("--count", type=at_least(1), default=20)
    parser.add_argument("--columns", type=at_least(1), default=5)
    parser.add_argument("--start", type=at_least(0), default=0, help="position in the order to begin at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", default="", help="stage whose order is shown")
    parser.add_argument("--flip", action="store_true", help="mirror half of the samples")
    parser.add_argument("--tags", action="store_true", help="shuffle and drop tags (kept ||| tag $$ tag %%%% tag)")
    parser.add_argument(
        "--positions", choices=("area", "long_side"), default="area", help="as the model's (default %(default)s)"
    )
    parser.add_argument("--drop", type=float, default=0.1, help="share of empty captions (default %(default)s)")
    parser.add_argument("--tokenizer", help="text encoder (name or folder) whose tokens are counted, not words")
    parser.add_argument("--context-length", type=at_least(1), default=256)


def run(arguments: argparse.Namespace) -> int:
    """Draw the sheet."""
    from hdm_lightning.data.captions import CaptionRules, TagGrammar  # noqa: PLC0415 (for --help's sake)
    from hdm_lightning.data.crops import CropRules  # noqa: PLC0415 (as above)
    from hdm_lightning.data.inspection import preview  # noqa: PLC0415 (as above)
    from hdm_lightning.data.rules import StreamConfig  # noqa: PLC0415 (loads torch)
    from hdm_lightning.data.sample_plan import Source  # noqa: PLC0415 (loads torch)
    from hdm_lightning.data.samples import stream  # noqa: PLC0415 (loads torch)
    from hdm_lightning.generation.contact_sheet import contact_sheet  # noqa: PLC0415 (as above)

    require_picture(Path(arguments.out), "--out")
    config = StreamConfig(
        sources=(Source(tuple(arguments.places)),),
        resolution=arguments.resolution,
        context_length=arguments.context_length,
        seed=arguments.seed,
        stage=arguments.stage,
        crop=CropRules(flip=arguments.flip),
        captions=CaptionRules(drop=arguments.drop, tags=TagGrammar() if arguments.tags else None),
        max_bad_share=1.0,
    )
    stop = arguments.start + arguments.count
    samples = list(stream(config, _tokenize(arguments), start=arguments.start, stop=stop))
    images, texts = zip(*(preview(sample, arguments.positions) for sample in samples), strict=True)
    contact_sheet(images, texts, columns=arguments.columns, caption_lines=6).save(arguments.out)
    print(f"{len(samples)} samples: {arguments.out}")
    return 0


def _tokenize(arguments: argparse.Namespace) -> "Tokenize":
    if not arguments.tokenizer:
        return _words
    from hdm_lightning.encoders.tokenizer import Tokenizer  # noqa: PLC0415 (only where asked for)

    return Tokenizer(arguments.tokenizer, where="--tokenizer").bind(arguments.context_length)


def _words(caption: str) -> tuple[list[int], int]:
    words = caption.split()
    return [0] * len(words), len(words)
