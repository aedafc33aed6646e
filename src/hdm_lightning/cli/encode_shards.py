"""hdm-shards encode and encode-captions: images to one set of latents per resolution, captions to text states.

Both use all devices.
"""

# ruff: noqa: PLC0415 (torch is imported only when the command runs, to keep --help fast)
import argparse
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hdm_lightning.argument_types import whole_number
from hdm_lightning.errors import UserError

if TYPE_CHECKING:
    from hdm_lightning.data.latent_sets import LatentFormat
    from hdm_lightning.datasets.caption_states import EncodeText
    from hdm_lightning.datasets.encoding import Encode, EncodedSet, EncodeOptions

MOST_THREADS = 16
"""Maximum number of threads that decode images in each process."""


def device_arguments(command: argparse.ArgumentParser, of: str) -> None:
    """Add --devices and --dtype."""
    devices = "auto (all GPUs, else the CPU), cpu, or a number of devices (default %(default)s)"
    command.add_argument("--devices", default="auto", help=devices)
    command.add_argument("--dtype", default="auto", help=f"of the {of} (default: bfloat16 on GPUs, else float32)")


def chosen_dtype(wanted: str, device: str) -> str:
    """Return the name of the dtype selected by `--dtype` on a device. Raises UserError: it is unknown."""
    from hdm_lightning.precision import dtype_name, encoder_dtype, parse_dtype

    return dtype_name(parse_dtype(wanted, where="--dtype") or encoder_dtype(device))


def encode_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    command.add_argument("shards", metavar="SHARDS", help="folder or pattern of indexed shards of images")
    command.add_argument("--out", required=True, type=Path, help="output folder for one set of shards per resolution")
    command.add_argument("--vae", required=True, help="autoencoder: a folder, a run, or a hub name")
    command.add_argument(
        "--resolution",
        required=True,
        nargs="+",
        type=whole_number(1),
        help="short sides of the resized images in pixels",
    )
    device_arguments(command, "autoencoder")
    command.add_argument(
        "--max-pixels", type=whole_number(1), help="pixels per encoder call (default: as vae.max_pixels)"
    )
    command.add_argument(
        "--max-aspect", type=float, default=8.0, help="skip longer images, like data.crop (default %(default)s)"
    )
    command.add_argument(
        "--std", action="store_true", help="store the standard deviation next to the mean; hdm-train does not use it"
    )
    command.add_argument("--dry-run", action="store_true", help="report the disk space needed, and stop")


def encode(arguments: argparse.Namespace) -> int:
    """Report the disk space needed, encode the sets and print one line each."""
    from hdm_lightning.datasets.encoding import EncodedSet
    from hdm_lightning.datasets.shard_work import require_room

    options, wanted = _options(arguments), sorted(set(arguments.resolution))
    formats = _formats(arguments.vae, wanted, 2 if arguments.std else 1)
    sets = [EncodedSet(arguments.shards, arguments.out, each, options) for each in formats]
    forecasts = [each.forecast() for each in sets]
    for resolution, found in zip(wanted, forecasts, strict=True):
        size = f"{found.bytes / 1e6:,.1f} MB, {found.missing / 1e6:,.1f} MB to write"
        print(f"{resolution} px: {found.samples:,} samples, about {size}")
    free = require_room(arguments.out, sum(found.missing for found in forecasts))
    print(f"{free / 1e6:,.1f} MB free in {arguments.out}", flush=True)
    if not arguments.dry_run:
        for each in sets:
            _make(each)
    return 0


def _make(wanted: "EncodedSet") -> None:
    from hdm_lightning.data.parallel import progress_bar

    with progress_bar(f"{wanted.folder.name}, samples", wanted.samples) as show:
        index = wanted.make(show)
    print(f"{wanted.folder}: {index.samples:,} samples in {len(index.shards)} shards", flush=True)


def _options(arguments: argparse.Namespace) -> "EncodeOptions":
    from hdm_lightning.data.parallel import available_cores
    from hdm_lightning.datasets.encoding import EncodeOptions
    from hdm_lightning.encoders.autoencoder import MAX_PIXELS

    if not arguments.max_aspect >= 1:
        raise UserError(f"is {arguments.max_aspect}", where="--max-aspect", hint="use 1 or more")
    devices = chosen_devices(arguments.devices)
    dtype, max_pixels = chosen_dtype(arguments.dtype, devices[0]), arguments.max_pixels or MAX_PIXELS
    return EncodeOptions(
        start=partial(start, arguments.vae, dtype, max_pixels),
        dtype=dtype,
        max_pixels=max_pixels,
        max_aspect=arguments.max_aspect,
        devices=devices,
        threads=max(1, min(MOST_THREADS, available_cores() // len(devices))),
    )


def chosen_devices(wanted: str) -> tuple[str, ...]:
    """Return the devices for `auto`, `cpu` or a number: GPUs if available, else processes on the CPU.

    Raises:
        UserError: it is none of these, or there are fewer GPUs.
    """
    import torch

    gpus = torch.cuda.device_count()
    if wanted == "cpu":
        return ("cpu",)
    if wanted == "auto":
        return tuple(f"cuda:{number}" for number in range(gpus)) or ("cpu",)
    if not (wanted.isascii() and wanted.isdigit()) or not 0 < int(wanted) <= (gpus or 1024):
        hint = f"use auto, cpu, or a number{f' up to {gpus}' if gpus else ''}"
        raise UserError(f"is {wanted!r}", where="--devices", hint=hint)
    return tuple(f"cuda:{number}" if gpus else "cpu" for number in range(int(wanted)))


def start(vae: str, dtype: str, max_pixels: int, device: str) -> "Encode":
    """Return a function that encodes uint8 images on a device, exactly as training does."""
    from hdm_lightning.encoders.autoencoder import KLAutoencoder, load_autoencoder
    from hdm_lightning.encoders.vae_folder import channels_of, locate_autoencoder, read_config

    channels = channels_of(read_config(locate_autoencoder(vae, where="--vae"), where="--vae"))
    mean, std = [0.0] * channels, [1.0] * channels  # moments are not normalized
    autoencoder = load_autoencoder(vae, dtype=dtype, max_pixels=max_pixels, mean=mean, std=std, where="--vae")
    assert isinstance(autoencoder, KLAutoencoder)
    autoencoder.to(device)
    return lambda images: autoencoder.moments(images.to(device).float().div_(127.5).sub_(1.0))


def _formats(vae: str, resolutions: Sequence[int], moments: int = 1) -> list["LatentFormat"]:
    """Return the latent format of each resolution.

    Raises:
        UserError: the autoencoder does not exist, or its factor does not divide a resolution.
    """
    from hdm_lightning.data.latent_sets import LatentFormat
    from hdm_lightning.encoders.vae_folder import (
        channels_of,
        factor_of,
        folder_fingerprint,
        locate_autoencoder,
        read_config,
    )

    folder = locate_autoencoder(vae, where="--vae")
    written = read_config(folder, where="--vae")
    factor = factor_of(written)
    for resolution in resolutions:
        if resolution % factor:
            hint = f"use {max(1, round(resolution / factor)) * factor}"
            what = f"{resolution} is not a multiple of the autoencoder's factor, {factor}"
            raise UserError(what, where="--resolution", hint=hint)
    channels, fingerprint = channels_of(written), folder_fingerprint(folder, where="--vae")
    return [LatentFormat(resolution, factor, channels, fingerprint, vae, moments) for resolution in resolutions]


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
        start=partial(start_text, name, arguments.layer, dtype, max_tokens),
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


def start_text(name: str, layer: int, dtype: str, max_tokens: int, device: str) -> "EncodeText":
    """Return a function that encodes tokens on a device, exactly as training does."""
    from hdm_lightning.encoders.text import load_text_encoder

    where = "--text-encoder"
    encoder = load_text_encoder(name, layer=layer, dtype=dtype, max_tokens=max_tokens, where=where).to(device)
    return lambda tokens, lengths: encoder.encode(tokens.to(device), lengths)
