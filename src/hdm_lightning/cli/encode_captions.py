"""hdm-shards encode-captions: encode the captions of shards to text-encoder states on disk, on all devices."""

# ruff: noqa: PLC0415 (torch is imported only when the command runs, to keep --help fast)
import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hdm_lightning.argument_types import whole_number
from hdm_lightning.cli.encode_shards import chosen_devices, chosen_dtype, device_arguments

if TYPE_CHECKING:
    from hdm_lightning.datasets.caption_states import EncodeText


def encode_captions_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    command.add_argument("shards", metavar="SHARDS", help="folder or pattern of indexed shards of images or latents")
    command.add_argument("--out", required=True, type=Path, help="output folder for the states")
    command.add_argument("--text-encoder", required=True, help="like text_encoder.name: a folder, package or hub name")
    command.add_argument("--layer", type=int, default=-1, help="like text_encoder.layer (default %(default)s)")
    command.add_argument(
        "--context-length", nargs="+", type=whole_number(1), default=[256], help="lengths of the stages (default 256)"
    )
    command.add_argument("--fields", nargs="+", help="like data.captions.fields (default: captions caption)")
    device_arguments(command, "states")
    command.add_argument("--max-tokens", type=whole_number(1), help="tokens per encoder call (default 65536)")


def encode_captions(arguments: argparse.Namespace) -> int:
    """Encode the captions and report how many there are."""
    from hdm_lightning.data.captions import CaptionRules
    from hdm_lightning.data.parallel import progress_bar
    from hdm_lightning.data.text_states import TextFormat
    from hdm_lightning.datasets.caption_states import EncodedCaptions, StateOptions
    from hdm_lightning.encoders.text import MAX_TOKENS, text_fingerprint, text_width
    from hdm_lightning.encoders.tokenizer import Tokenizer

    name, where, lengths = arguments.text_encoder, "--text-encoder", tuple(sorted(set(arguments.context_length)))
    devices = chosen_devices(arguments.devices)
    dtype = chosen_dtype(arguments.dtype, devices[0])
    fingerprint = text_fingerprint(name, arguments.layer, where=where)
    form = TextFormat(fingerprint, text_width(name, where=where), dtype, lengths, name)
    tokenizer = Tokenizer(name, where=where).load()
    max_tokens = arguments.max_tokens or MAX_TOKENS
    fields = CaptionRules.fields if arguments.fields is None else tuple(arguments.fields)
    options = StateOptions(
        start=partial(start, name, arguments.layer, dtype, max_tokens),
        tokenize=[tokenizer.bind(length) for length in lengths],
        max_tokens=max_tokens,
        captions=CaptionRules(fields=fields),
        devices=devices,
    )
    wanted = EncodedCaptions(arguments.shards, arguments.out, form, options)
    print(f"{wanted.samples:,} samples, {len(wanted.missing())} of {len(wanted.shards)} shards to read", flush=True)
    with progress_bar("captions of samples", wanted.samples) as show:
        captions = wanted.make(show)
    setting = f"data.text_states={shlex.quote(str(arguments.out))}"
    print(f"{arguments.out}: {captions:,} different captions; train with {setting}")
    return 0


def start(name: str, layer: int, dtype: str, max_tokens: int, device: str) -> "EncodeText":
    """Return a function that encodes tokens on a device, exactly as training does."""
    from hdm_lightning.encoders.text import load_text_encoder

    where = "--text-encoder"
    encoder = load_text_encoder(name, layer=layer, dtype=dtype, max_tokens=max_tokens, where=where).to(device)
    return lambda tokens, lengths: encoder.encode(tokens.to(device), lengths)
