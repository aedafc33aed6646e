"""The arguments of hdm-evaluate, and what they say."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hdm_lightning.errors import UserError

PARTS = (
    "loss",
    "frechet",
    "kernel",
    "neighbours",
    "agreement",
    "shapes",
    "diversity",
    "aspect",
    "camera",
    "copies",
)
# Options that go straight into the settings of the same name.
SETTINGS = (
    "seed",
    "samples",
    "train_samples",
    "loss_samples",
    "time_bins",
    "resamples",
    "set_resamples",
    "confidence",
    "clip",
    "aspect_prompts",
    "camera_prompts",
    "camera_shift",
    "camera_zoom",
    "diversity_prompts",
    "diversity_seeds",
    "shapes_prompts",
    "shapes_pairs",
)
SAMPLING = ("steps", "solver", "shift", "guidance_scale", "negative_prompt")

_DESCRIPTION = """Measure a model, every number with an interval.

MODEL is a run's folder, its final/ folder, a weights file in it, a published single file, or a training
checkpoint (.ckpt) at its place in a run. Real pictures come from the run's own settings or from --data and
--train-data. `hdm-evaluate vae FOLDER` measures an autoencoder instead."""

_PARTS = """parts:
  loss        flow loss by time, on held-out and on training pictures
  frechet     Fréchet distance on named features (FID with --features inception)
  kernel      kernel distance on them (KID with --features inception); CMMD with --clip
  neighbours  precision, recall, density, coverage
  agreement   do pictures go with their captions: CLIPScore with --clip, else a small head trained on the training set
  shapes      following prompts of shapes, where the data are shapes
  diversity   how different pictures of one prompt are
  aspect      other aspect ratios against squares
  camera      does the picture move as x_shift, y_shift and zoom say
  copies      nearest training pictures

examples:
  hdm-evaluate runs/shapes
  hdm-evaluate runs/shapes --parts loss,kernel,camera --samples 500 --weights ema
  hdm-evaluate published.safetensors --data /my/shards --text-encoder /models/qwen3
  hdm-evaluate vae runs/vae --data /my/shards --size 256
"""


def parser() -> argparse.ArgumentParser:
    """The parser of models; needs nothing slow to import."""
    command = argparse.ArgumentParser(
        prog="hdm-evaluate",
        description=_DESCRIPTION,
        epilog=_PARTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="run, final/ folder, weights file or checkpoint")
    _add_what(command)
    _add_counts(command)
    _add_drawing(command)
    group = command.add_argument_group("model and machine")
    group.add_argument("--weights", action="append", choices=("ema", "raw", "file"), help="default: all there are")
    group.add_argument("--text-encoder", metavar="NAME", help="name or folder instead of the model's own")
    group.add_argument("--vae", metavar="NAME", help="name or folder instead of the model's own")
    group.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        help="default: on cuda bfloat16 if it has it, else float16",
    )
    _add_machine(command, batch=8)
    return command


def vae_parser() -> argparse.ArgumentParser:
    """The parser of autoencoders."""
    command = argparse.ArgumentParser(
        prog="hdm-evaluate vae",
        description="Measure an autoencoder on held-out pictures, every number with an interval.",
    )
    command.add_argument("folder", type=Path, metavar="FOLDER", help="diffusers AutoencoderKL, or a hdm-train-vae run")
    command.add_argument("--data", action="append", required=True, metavar="FOLDER", help="shards; repeat for several")
    command.add_argument("--size", type=int, default=256, metavar="PX", help="side of the pictures (default: 256)")
    command.add_argument(
        "--on-indivisible",
        choices=("refuse", "pad"),
        default="refuse",
        help="a --size that the autoencoder's factor does not divide: refuse it (default), or mirror the edges",
    )
    command.add_argument("--samples", type=int, default=1500, metavar="N", help="pictures (default: 1500)")
    command.add_argument("--perceptual", metavar="NAME", help="efficientnet_lite0 (default), lpips_vgg … or none")
    _add_features(command)
    _add_resampling(command)
    _add_machine(command, batch=16)
    return command


def parse(argv: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """`model` or `vae`, and its arguments."""
    if argv and argv[0] == "vae":
        return "vae", vae_parser().parse_args(argv[1:])
    return "model", parser().parse_args(argv)


def parts_of(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """The parts asked for by name, or None for all that can be done.

    Raises:
        UserError: for an unknown one.
    """
    if arguments.parts is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in arguments.parts.split(",") if name.strip()))
    for name in names:
        if name not in PARTS:
            raise UserError(f"{name!r} is no part", where="--parts", hint=f"choose among {', '.join(PARTS)}")
    return names or None


def settings_given(arguments: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """The fields of a settings class that the command line gives.

    Raises:
        UserError: for ratios that are no positive numbers.
    """
    known = {entry.name for entry in fields(kind)}
    given = {name: getattr(arguments, name, None) for name in SETTINGS if name in known}
    found = {name: value for name, value in given.items() if value is not None}
    if arguments.features:
        found["features"] = tuple(arguments.features)
    if getattr(arguments, "ratios", None):
        found["ratios"] = _ratios(arguments.ratios)
    return found


def sampling_given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that the command line gives."""
    found = {name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None}
    return found if arguments.size is None else {**found, "height": arguments.size, "width": arguments.size}


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(_ratio(part) for part in text.split(","))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{text!r} are no ratios", where="--ratios", hint="give them as in 2:3,3:2 or 0.5,2") from error
    if not all(0.1 <= ratio <= 10 for ratio in ratios):
        raise UserError(f"{text!r} goes beyond 1:10 and 10:1", where="--ratios", hint="give ratios between them")
    return ratios


def _ratio(text: str) -> float:
    width, _, height = text.partition(":")
    return float(width) / float(height or 1)


def _add_what(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what to measure, and against what")
    group.add_argument("--parts", metavar="A,B,…", help="parts by name; default: all that can be done (see below)")
    group.add_argument("--data", action="append", default=[], metavar="FOLDER", help="reference shards with captions")
    group.add_argument("--train-data", action="append", default=[], metavar="FOLDER", help="training shards")
    _add_features(group)
    group.add_argument("--clip", metavar="NAME", help="CLIP by hub name or folder: CLIPScore and CMMD")


def _add_features(group: Any) -> None:
    group.add_argument(
        "--features",
        action="append",
        metavar="NAME",
        help="feature network, repeat for several: efficientnet_lite0 (default, offline), inception (torch-fidelity), "
        "timm:NAME, or a transformers vision model by hub name or folder",
    )


def _add_counts(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how many")
    group.add_argument("--samples", type=int, metavar="N", help="pictures drawn, and reference ones (default: 1500)")
    group.add_argument("--train-samples", type=int, metavar="N", help="training pictures looked at (default: 5000)")
    group.add_argument("--loss-samples", type=int, metavar="N", help="pictures of the flow loss (default: 256)")
    group.add_argument("--time-bins", type=int, metavar="K", help="bins of the time (default: 8)")
    group.add_argument("--aspect-prompts", type=int, metavar="N", help="prompts drawn at each size (default: 48)")
    group.add_argument("--ratios", metavar="W:H,…", help="aspect ratios (default: 1:2,2:3,3:2,2:1)")
    group.add_argument("--camera-prompts", type=int, metavar="N", help="prompts drawn with each camera (default: 48)")
    group.add_argument("--camera-shift", type=float, metavar="D", help="1 is half a square's side (default: 0.25)")
    group.add_argument("--camera-zoom", type=float, metavar="Z", help="above 1 is nearer (default: 1.25)")
    group.add_argument("--diversity-prompts", type=int, metavar="N", help="prompts (default: 24)")
    group.add_argument("--diversity-seeds", type=int, metavar="N", help="pictures of each (default: 6)")
    group.add_argument("--shapes-prompts", type=int, metavar="N", help="prompts of one shape (default: 128)")
    group.add_argument("--shapes-pairs", type=int, metavar="N", help="prompts of two shapes (default: 64)")
    _add_resampling(command)


def _add_resampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("seeds and intervals")
    group.add_argument("--seed", type=int, metavar="S", help="of pictures, noise and resampling (default: 0)")
    group.add_argument("--resamples", type=int, metavar="R", help="of cheap intervals (default: 1000)")
    group.add_argument(
        "--set-resamples", type=int, metavar="R", help="of the Fréchet distance and neighbours (default: 100)"
    )
    group.add_argument("--confidence", type=float, metavar="P", help="of intervals (default: 0.95)")


def _add_drawing(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how to draw (defaults: the model's own)")
    group.add_argument("--size", type=int, metavar="PX", help="side of the square pictures")
    group.add_argument("--steps", type=int, metavar="N", help="solver steps")
    group.add_argument("--solver", metavar="NAME", help="euler, heun, ab2 or ab3")
    group.add_argument("--shift", type=float, metavar="A", help="above 1: more steps near noise")
    group.add_argument("--guidance", dest="guidance_scale", type=float, metavar="S", help="1 is none")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what to guide away from")


def _add_machine(command: argparse.ArgumentParser, *, batch: int) -> None:
    group = command.add_argument_group("output and machine")
    group.add_argument("--out", type=Path, metavar="DIR", help="default: evaluation/ in the model's or run's folder")
    group.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if there is one)")
    group.add_argument("--batch", type=int, default=batch, metavar="N", help=f"pictures at once (default: {batch})")
