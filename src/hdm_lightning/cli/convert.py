"""hdm-convert: a trained network from one layout of files to another, or what a file holds."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from hdm_lightning.cli.errors import run_command
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line, printable

if TYPE_CHECKING:
    from hdm_lightning.interop.release import Release

TARGETS = {
    "project": "a folder of this project, for hdm-sample and hdm-train init=",
    "published": "one file, .safetensors or .ckpt, network and what lies beside it under the published names",
    "comfyui": "the published single file as the ComfyUI loader expects it: autoencoder inside, float16",
    "diffusers": "a folder with unet/ and vae/",
    "bare": "one file with the network alone under the published names",
}
DTYPES = ("float32", "float16", "bfloat16")
SINGLE_FILES = ("published", "comfyui", "bare")
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""How the name of a single file may end: by it the file is written and read."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    layouts = "\n".join(f"  {name:10} {text}" for name, text in TARGETS.items())
    result = argparse.ArgumentParser(
        prog="hdm-convert",
        description="Convert a trained network between layouts, bit for bit unless --dtype says otherwise. Without a\n"
        "destination, tell what the source holds.",
        epilog=f"layouts:\n{layouts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("source", type=Path, help="a run's folder, a model folder, a diffusers folder or a file")
    result.add_argument("destination", type=Path, nargs="?", help="file or folder to write")
    result.add_argument(
        "--to", choices=TARGETS, help="layout to write (default: published for a file name, else project)"
    )
    result.add_argument("--dtype", choices=DTYPES, help="cast all tensors (default: as stored; comfyui: float16)")
    result.add_argument("--vae", type=Path, help="diffusers folder of the autoencoder to put in instead")
    result.add_argument("--text-encoder", help="name or folder that a project folder is to record")
    result.add_argument(
        "--average",
        type=float,
        metavar="WIDTH",
        help="of a run trained with callbacks.ema.sigma_rel: its average of this relative width, e.g. 0.08",
    )
    result.add_argument("--samples", type=int, help="with --average: at so many samples seen (default: the end)")
    result.add_argument("--force", action="store_true", help="replace what is at the destination")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Convert or describe; returns the exit status."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: _convert(arguments))


def _convert(arguments: argparse.Namespace) -> None:
    from hdm_lightning.cli.convert_parts import describe  # noqa: PLC0415  (torch, for --help's sake)
    from hdm_lightning.interop.layouts import detect_layout  # noqa: PLC0415  (as above)

    source, destination = arguments.source, arguments.destination
    layout, release = detect_layout(source), _read(arguments)
    if destination is None:
        print(f"{in_one_line(source)}: {layout}\n{describe(release)}")
        return
    if destination.exists() and not arguments.force:
        raise UserError("is there already", where=str(destination), hint="choose another name, or add --force")
    target = arguments.to or ("published" if destination.suffix else "project")
    _check_destination(destination, target)
    _write(release, destination, target, arguments)
    print(f"{destination}: {target}, from {layout} {source}")


def _check_destination(destination: Path, target: str) -> None:
    """Refuse a name under which what is written could not be read back, or could not be written at all."""
    single = target in SINGLE_FILES
    if single and destination.suffix not in SUFFIXES:
        raise UserError(
            f"the suffix {destination.suffix!r} is unknown, and --to {target} writes one file",
            where=str(destination),
            hint=f"end the name in {' or '.join(SUFFIXES[:2])}, or choose --to project for a folder",
        )
    if destination.exists() and destination.is_dir() == single:
        kinds = ("folder", "file") if single else ("file", "folder")
        what = f"is a {kinds[0]}, and --to {target} writes a {kinds[1]}"
        raise UserError(what, where=str(destination), hint="choose another name")


def _read(arguments: argparse.Namespace) -> "Release":
    from hdm_lightning.cli.convert_parts import with_vae  # noqa: PLC0415  (torch, for --help's sake)
    from hdm_lightning.interop.layouts import read_release  # noqa: PLC0415  (as above)

    release = read_release(arguments.source)
    if release.left_out:
        shown = ", ".join(map(in_one_line, release.left_out[:5]))
        print(f"warning: {len(release.left_out)} tensors are no part of a model: {shown} …", file=sys.stderr)
    if arguments.average is not None:
        release = _averaged(release, arguments)
    elif arguments.samples is not None:
        raise UserError("is for --average only", where="--samples", hint="add --average WIDTH, e.g. --average 0.08")
    return with_vae(release, arguments.vae) if arguments.vae else release


def _averaged(release: "Release", arguments: argparse.Namespace) -> "Release":
    from hdm_lightning.cli.convert_average import with_average  # noqa: PLC0415  (torch, for --help's sake)

    averaged, told = with_average(release, arguments.source, arguments.average, arguments.samples)
    print(printable(told))
    return averaged


def _write(release: "Release", destination: Path, target: str, arguments: argparse.Namespace) -> None:
    try:
        _writers(arguments)[target](_cast(release, arguments.dtype, target), destination)
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot be written ({error})", where=str(destination)) from error
    except ValueError as error:
        hint = "keep it as a project folder, train with the published wiring, or give what is missing"
        raise UserError(str(error), where=f"--to {target}", hint=hint) from error


def _writers(arguments: argparse.Namespace) -> "dict[str, Callable[[Release, Path], None]]":
    from hdm_lightning.cli import convert_parts as parts  # noqa: PLC0415  (torch, for --help's sake)

    return {
        "project": lambda release, path: parts.write_project(release, path, arguments.text_encoder),
        "published": parts.write_published,
        "comfyui": parts.write_comfyui,
        "diffusers": parts.write_diffusers,
        "bare": parts.write_bare,
    }


def _cast(release: "Release", dtype: str | None, target: str) -> "Release":
    import torch  # noqa: PLC0415  (for --help's sake)

    if dtype is None and target == "comfyui":
        dtype = "float16"
    return release if dtype is None else release.cast(getattr(torch, dtype))
