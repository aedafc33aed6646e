"""The arguments of hdm-sample, and what they say."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from hdm_lightning.errors import UserError

SIZE_OF_IMAGE = "image"
# Options that go straight into the sampling settings of the same name.
SETTINGS = (
    "steps",
    "solver",
    "shift",
    "guidance_scale",
    "guidance_interval",
    "negative_prompt",
    "routing_scale",
    "conditional_rate",
    "unconditional_rate",
    "weak_rate",
    "x_shift",
    "y_shift",
    "zoom",
    "strength",
    "on_indivisible",
)

_DESCRIPTION = """Draw pictures from prompts.

MODEL is a run's folder (its final/ is used), a final/ folder, a model.safetensors inside one, or a published
network: a single file (.safetensors, .ckpt) or a diffusers folder. Prompts come from the command line, from
--prompts FILE, or, if there are neither, one a line from standard input. Every PNG carries its settings; --repeat
draws it again."""

_EXAMPLES = """examples:
  hdm-sample runs/shapes "a large red circle" --count 4
  hdm-sample runs/shapes --prompts prompts.txt --size 512x512 --size 768x384
  hdm-sample --repeat samples/0000-a-large-red-circle-0.png --steps 50
  hdm-sample runs/shapes "a star" --image sketch.png --strength 0.6 --size image --on-indivisible pad
"""


def parser() -> argparse.ArgumentParser:
    """The command's parser; needs nothing slow to import."""
    command = argparse.ArgumentParser(
        prog="hdm-sample",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="run, final/ folder or weights file")
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    _add_what(command)
    _add_how(command)
    _add_model(command)
    return command


def _add_what(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what to draw")
    group.add_argument("--prompts", dest="prompt_file", metavar="FILE", help="one prompt a line; - is standard input")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what to guide away from (default: empty)")
    group.add_argument("--count", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    group.add_argument("--seed", type=int, metavar="S", help="first seed, counted up (default: 0)")
    group.add_argument(
        "--size", action="append", metavar="WIDTHxHEIGHT", help="in pixels, or: image, that of --image; may be repeated"
    )
    group.add_argument(
        "--on-indivisible",
        choices=("refuse", "pad"),
        help="a size that the network's grid does not fit: refuse it (default), or draw larger and cut back",
    )
    group.add_argument("--repeat", type=Path, metavar="PNG", help="draw this picture again from its own settings")
    group.add_argument("--image", type=Path, metavar="FILE", help="start from this picture (image-to-image)")
    group.add_argument("--strength", type=float, metavar="T", help="noise mixed into --image, above 0 to 1")
    group.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="folder (default: samples)")
    group.add_argument("--no-sheet", dest="sheet", action="store_false", help="no contact sheet of many pictures")


def _add_how(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how to draw it (defaults: the model's own)")
    group.add_argument("--steps", type=int, metavar="N", help="solver steps")
    group.add_argument("--solver", metavar="NAME", help="euler, heun, ab2 or ab3 (Adams-Bashforth)")
    group.add_argument("--shift", type=float, metavar="A", help="above 1: more steps near noise")
    group.add_argument(
        "--guidance", dest="guidance_scale", type=float, metavar="S", help="towards the prompt; 1 is none"
    )
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="times at which it acts; 1 is noise, 0 the picture",
    )
    group.add_argument(
        "--routing-guidance",
        dest="routing_scale",
        type=float,
        metavar="W",
        help="away from a branch that routes more tokens; 1 is none",
    )
    group.add_argument(
        "--weak-rate", type=float, metavar="G", help="token routing of its weak branch: share that skips the U"
    )
    group.add_argument(
        "--rate",
        dest="conditional_rate",
        type=float,
        metavar="G",
        help="token routing of the prompt's branch, from 0 to below 1",
    )
    group.add_argument(
        "--negative-rate",
        dest="unconditional_rate",
        type=float,
        metavar="G",
        help="token routing of the branch that --guidance moves away from",
    )
    group.add_argument("--x-shift", type=float, metavar="D", help="camera to the right; 1 is half a square's side")
    group.add_argument("--y-shift", type=float, metavar="D", help="camera down")
    group.add_argument("--zoom", type=float, metavar="Z", help="camera in (above 1) or out")


def _add_model(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("model and machine")
    group.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or last weights")
    group.add_argument("--text-encoder", metavar="NAME", help="name or folder instead of the model's own")
    group.add_argument("--vae", metavar="NAME", help="name or folder instead of the model's own")
    group.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if there is one)")
    group.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        help="default: on cuda bfloat16 if it has it, else float16",
    )
    group.add_argument("--batch", type=int, default=8, metavar="N", help="pictures at once (default: 8)")


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    """The prompts from the command line and the file, or else from standard input.

    Raises:
        UserError: if there are none, or the file cannot be read.
    """
    prompts = list(arguments.prompts)
    if arguments.prompt_file and arguments.prompt_file != "-":
        try:
            prompts += Path(arguments.prompt_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read ({error})", where=f"--prompts {arguments.prompt_file}") from error
    elif arguments.prompt_file or (not prompts and not sys.stdin.isatty()):
        prompts += sys.stdin.read().splitlines()
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(
            "there are none",
            where="prompts",
            hint='give them as arguments, hdm-sample MODEL "a red circle", with --prompts FILE, or on standard input',
        )
    return prompts


def sizes_of(arguments: argparse.Namespace, image: Path | None) -> list[dict[str, int]]:
    """Widths and heights asked for, `image` standing for those of the picture to start from; empty if none were.

    Raises:
        UserError: if a size is not WIDTHxHEIGHT.
    """
    sizes = []
    for size in arguments.size or []:
        if size.strip().lower() == SIZE_OF_IMAGE:
            sizes.append(_size_of_image(image))
            continue
        match = re.fullmatch(r"(\d+)[x×](\d+)", size.strip().lower())
        if match is None:
            raise UserError(f"{size!r} is no size", where="--size", hint="give WIDTHxHEIGHT, as in 768x512")
        sizes.append({"width": int(match[1]), "height": int(match[2])})
    return sizes


def _size_of_image(image: Path | None) -> dict[str, int]:
    from hdm_lightning.generation.start_image import image_size  # noqa: PLC0415  (torch, for --help's sake)

    if image is None:
        raise UserError("image means the picture to start from", where="--size image", hint="add --image FILE")
    width, height = image_size(image)
    return {"width": width, "height": height}


def settings_given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that the command line gives, without those it leaves to the model.

    Raises:
        UserError: if a count is out of its range.
    """
    for option in ("count", "batch"):
        if getattr(arguments, option) < 1:
            raise UserError(f"is {getattr(arguments, option)}, expected at least 1", where=f"--{option}")
    if arguments.seed is not None and arguments.seed < 0:
        raise UserError(f"is {arguments.seed}, expected at least 0", where="--seed")
    if arguments.strength is not None and not (arguments.image or arguments.repeat):
        raise UserError("is given without a picture to start from", where="--strength", hint="add --image FILE")
    return {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
