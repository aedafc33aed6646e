"""hdm-shards caption: add captions from a vision-language model to shards of images."""

# ruff: noqa: PLC0415 (torch is imported only when the command runs, to keep --help fast)
import argparse
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hdm_lightning.argument_types import whole_number
from hdm_lightning.cli.encode_shards import MOST_THREADS, chosen_devices, chosen_dtype, device_arguments
from hdm_lightning.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

    from hdm_lightning.datasets.captioning import CaptionOptions, Describe, Summary

PROMPTS = {
    "long": "Describe this image in detail in one paragraph: its subjects, what they do and how they look, where they "
    "are in the image, the background, the light, the colours and the style. State only what can be seen.",
    "short": "Describe this image in one short sentence.",
    "tags": "List what can be seen in this image as short tags, parted by commas. Give the tags alone.",
}
"""Default prompt for each kind of caption."""

KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
RESERVED = ("txt", "json")
MOST_REASONS = 8


def caption_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    command.add_argument("shards", metavar="SHARDS", help="folder or pattern of indexed shards of images")
    command.add_argument("--out", required=True, type=Path, help="output folder for the captioned shards")
    command.add_argument("--model", required=True, help="vision-language model of transformers: a folder or a hub name")
    command.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        metavar="KIND[=TEXT]",
        help=f"kind of caption and its prompt, repeatable; {', '.join(PROMPTS)} have default prompts (default long)",
    )
    command.add_argument("--batch-size", type=whole_number(1), default=8, help="images per batch (default %(default)s)")
    command.add_argument("--max-tokens", type=whole_number(1), default=256, help="per caption (default %(default)s)")
    command.add_argument(
        "--max-side",
        type=whole_number(16),
        default=1024,
        metavar="PX",
        help="larger images are scaled down for the model (default %(default)s)",
    )
    device_arguments(command, "model")


def caption(arguments: argparse.Namespace) -> int:
    """Caption the images, and report the captions and the failures."""
    from hdm_lightning.data.captions import CaptionRules
    from hdm_lightning.data.parallel import progress_bar
    from hdm_lightning.datasets.captioning import CaptionedSet
    from hdm_lightning.datasets.shard_work import require_room

    made = CaptionedSet(arguments.shards, arguments.out, _options(arguments))
    require_room(arguments.out, made.missing_bytes, "the shards with their captions")
    waiting = sum(shard.samples for shard in made.missing())
    if waiting < made.samples:
        print(f"{made.samples - waiting:,} of {made.samples:,} images are in finished shards", flush=True)
    with progress_bar("images", made.samples) as show:
        index, summary = made.make(show)
    told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(summary.captions.items())) or "no captions"
    print(f"{arguments.out}: {index.samples:,} samples in {len(index.shards)} shards, captions: {told}")
    for line in _faults(summary, arguments):
        print(line)
    if summary.captions:
        kinds = ", ".join(f"{kind}: 1" for kind in (*sorted(summary.captions), "txt", *CaptionRules().fields))
        print(f"train on them and on the existing texts: 'data.captions.kinds={{{kinds}}}'")
    return 0


def prompts_from(given: Sequence[str] | None) -> dict[str, str]:
    """Return the prompt of each kind, parsed from KIND or KIND=TEXT.

    Raises:
        UserError: a kind has no default prompt and no text, an invalid name, or appears twice.
    """
    prompts: dict[str, str] = {}
    for word in given or ["long"]:
        kind, equals, text = word.partition("=")
        if not KIND.fullmatch(kind) or kind in RESERVED:
            what = f"{kind!r} cannot be a kind of caption"
            raise UserError(what, where="--prompt", hint="use letters and digits, such as long=TEXT")
        if not equals and kind not in PROMPTS:
            hint = f"{did_you_mean(kind, PROMPTS)} Or add a prompt: {kind}='Describe …'"
            raise UserError(f"there is no default prompt for {kind!r}", where="--prompt", hint=hint)
        if kind in prompts:
            raise UserError(f"{kind!r} appears twice", where="--prompt", hint="use each kind once")
        prompts[kind] = text.strip() if equals else PROMPTS[kind]
    return prompts


def _options(arguments: argparse.Namespace) -> "CaptionOptions":
    from hdm_lightning.data.parallel import available_cores
    from hdm_lightning.datasets.captioning import CaptionOptions
    from hdm_lightning.encoders.captioner import captioner_fingerprint

    prompts, devices = prompts_from(arguments.prompts), chosen_devices(arguments.devices)
    dtype = chosen_dtype(arguments.dtype, devices[0])
    fingerprint = captioner_fingerprint(arguments.model, where="--model")
    return CaptionOptions(
        start=partial(start, arguments.model, dtype, arguments.max_tokens),
        model=arguments.model,
        fingerprint=f"{fingerprint} {dtype} {arguments.max_tokens}",
        prompts=prompts,
        batch_size=arguments.batch_size,
        max_side_px=arguments.max_side,
        devices=devices,
        threads=max(1, min(MOST_THREADS, available_cores() // len(devices))),
    )


def start(model: str, dtype: str, max_tokens: int, device: str) -> "Describe":
    """Return a function that describes images on a device."""
    from hdm_lightning.encoders.captioner import load_captioner

    captioner = load_captioner(model, device=device, dtype=dtype, max_tokens=max_tokens, where="--model")

    def describe(images: "Sequence[Image.Image]", prompt: str) -> list[tuple[str, bool]]:
        return [(said.text, said.cut) for said in captioner.describe(images, prompt)]

    return describe


def _faults(summary: "Summary", arguments: argparse.Namespace) -> list[str]:
    """Return a line for each kind of problem."""
    from hdm_lightning.datasets.journal import REJECTED
    from hdm_lightning.printable import in_one_line

    lines = []
    if summary.cut:
        lines.append(f"  cut off by --max-tokens {arguments.max_tokens}: {summary.cut:,}")
    reasons = Counter(reason.partition(" at 0x")[0] for _, reason in summary.faults)
    for reason, count in reasons.most_common(MOST_REASONS):
        lines.append(f"  {count:,} times: {in_one_line(reason)}")
    if summary.faults:
        lines.append(f"  {arguments.out / REJECTED} lists each image with its reason")
    return lines
