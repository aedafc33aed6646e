"""hdm-sample: pictures from prompts, from a run, a trained model or a published file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm_lightning.cli.errors import run_command
from hdm_lightning.cli.sample_arguments import parser, prompts_of, settings_given, sizes_of
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

if TYPE_CHECKING:
    import torch

    from hdm_lightning.generation.album import Album
    from hdm_lightning.generation.jobs import DrawJob
    from hdm_lightning.generation.loading import LoadedModel
    from hdm_lightning.generation.record import ImageRecord
    from hdm_lightning.generation.settings import SamplingSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Draw pictures; returns the exit status."""
    arguments = parser().parse_intermixed_args(argv)
    return run_command(lambda: _sample(arguments))


def _sample(arguments: argparse.Namespace) -> None:
    from hdm_lightning.generation.album import Album  # noqa: PLC0415  (torch, for --help's sake)

    record = _record_to_repeat(arguments)
    repeats_prompt = record is not None and not arguments.prompts and not arguments.prompt_file
    prompts = [record.prompt] if record and repeats_prompt else prompts_of(arguments)
    given = settings_given(arguments)
    image = _start_image(arguments, record)
    device = _device(arguments.device)
    loaded_with = _loaded_with(arguments, record, device)
    loaded = _load(arguments, arguments.model or Path(record.model if record else ""), device, loaded_with)
    jobs = _jobs(arguments, given, prompts, loaded, record, image)
    fingerprint = loaded.fingerprint
    try:
        album = Album(
            arguments.out, model=str(loaded.path), fingerprint=fingerprint, image=image, loaded_with=loaded_with
        )
    except OSError as error:
        raise UserError(f"cannot be made ({error})", where=f"--out {arguments.out}", hint="give a folder") from error
    _warn_of_long(prompts, loaded)
    if record:
        for what in album.differences_from(record):
            told = f"warning: {what} is not the one that {arguments.repeat} was drawn with"
            print(in_one_line(told), file=sys.stderr)
    _draw(arguments, loaded, jobs, album)


def _warn_of_long(prompts: list[str], loaded: "LoadedModel") -> None:
    """Say which prompts reach the end of what the network reads."""
    tokenizer = loaded.pipeline.tokenizer
    for prompt in dict.fromkeys(prompts):
        if tokenizer(prompt)[1] == tokenizer.context_length:
            what = f"{prompt[:40]!r}… fills the {tokenizer.context_length} tokens of text that the model reads"
            print(f"warning: {in_one_line(what)}; whatever comes after is left out", file=sys.stderr)


def _record_to_repeat(arguments: argparse.Namespace) -> "ImageRecord | None":
    """The record of the picture to repeat, if one is to be repeated."""
    from hdm_lightning.generation.png import read_record  # noqa: PLC0415  (torch, for --help's sake)

    if arguments.repeat is None:
        if arguments.model is None:
            raise UserError("is missing", where="MODEL", hint="give a run's folder, or --repeat PNG")
        return None
    return read_record(arguments.repeat)


def _start_image(arguments: argparse.Namespace, record: "ImageRecord | None") -> Path | None:
    """The picture to start from: the one given, or the one that the picture to repeat started from."""
    image = arguments.image or (Path(record.image) if record and record.image else None)
    if image is not None and not image.is_file():
        raise UserError("does not exist", where=str(image), hint="give the picture to start from with --image FILE")
    return image


def _device(name: str | None) -> "torch.device":
    """The device to draw on: the one named, else a GPU if there is one."""
    import torch  # noqa: PLC0415  (seconds to import, for --help's sake)

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is no device", where="--device", hint="give cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"{name!r} is not there: {count} CUDA devices are", where="--device", hint="give another, or cpu"
        )
    return device


def _loaded_with(arguments: argparse.Namespace, record: "ImageRecord | None", device: "torch.device") -> dict[str, str]:
    """Precision and named encoders: from the command, else from the picture to repeat.

    Where the command names another model than the picture's, that model's own encoders serve.
    """
    known = {"precision": "bfloat16" if device.type == "cuda" else "float32", **(record.loaded_with if record else {})}
    if arguments.model is not None:
        known = {"precision": known["precision"]}
    given = {name: getattr(arguments, name) for name in ("precision", "text_encoder", "vae")}
    return known | {name: value for name, value in given.items() if value is not None}


def _load(
    arguments: argparse.Namespace, path: Path, device: "torch.device", loaded_with: dict[str, str]
) -> "LoadedModel":
    import torch  # noqa: PLC0415  (seconds to import, for --help's sake)

    from hdm_lightning.generation.loading import LoadOptions, load_text_to_image  # noqa: PLC0415

    precision = loaded_with["precision"]
    options = LoadOptions(
        device=device,
        autocast=None if precision == "float32" else getattr(torch, precision),
        weights=arguments.weights,
        text_encoder=loaded_with.get("text_encoder"),
        vae=loaded_with.get("vae"),
        max_batch=arguments.batch,
    )
    return load_text_to_image(path, options)


def _jobs(
    arguments: argparse.Namespace,
    given: dict[str, Any],
    prompts: list[str],
    loaded: "LoadedModel",
    record: "ImageRecord | None",
    image: Path | None,
) -> "list[DrawJob]":
    """What to draw: the picture's settings or the model's own, overridden by what the command says."""
    from hdm_lightning.generation.fitting import MAX_SEED  # noqa: PLC0415  (torch)
    from hdm_lightning.generation.jobs import plan_jobs  # noqa: PLC0415
    from hdm_lightning.generation.settings import SamplingSettings  # noqa: PLC0415

    base = {**(record.settings.to_json() if record else loaded.sampling), **given}
    sizes = sizes_of(arguments, image) or [{}]
    try:
        settings = [SamplingSettings.from_json({**base, **size}) for size in sizes]
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where="settings", hint="see hdm-sample --help") from error
    for one in settings:
        _check_size(one, loaded.pipeline.size_multiple, image)
    seed = arguments.seed if arguments.seed is not None else (record.seed if record else 0)
    if seed + arguments.count - 1 > MAX_SEED:
        raise UserError(f"counts up to {seed + arguments.count - 1}", where="--seed", hint=f"stay within {MAX_SEED}")
    return plan_jobs(prompts, seed, arguments.count, settings)


def _check_size(settings: "SamplingSettings", multiple: int, image: Path | None) -> None:
    """Refuse a size that does not fit, and say so if the picture to start from is cut to it."""
    from hdm_lightning.generation.start_image import is_cropped  # noqa: PLC0415  (torch, for --help's sake)

    size = f"{settings.width}x{settings.height}"
    if settings.on_indivisible == "refuse" and (settings.height % multiple or settings.width % multiple):
        nearest = f"{_rounded(settings.width, multiple)}x{_rounded(settings.height, multiple)}"
        raise UserError(
            f"{size} is not made of multiples of {multiple}",
            where="--size",
            hint=f"give {nearest}, or add --on-indivisible pad",
        )
    if image is not None and is_cropped(image, settings):
        what = f"{image} is scaled and cut about its centre to {size}"
        print(f"warning: {what}; --size image keeps all of it", file=sys.stderr)


def _draw(arguments: argparse.Namespace, loaded: "LoadedModel", jobs: "list[DrawJob]", album: "Album") -> None:
    """Draw, write each picture as soon as it is there, and the contact sheet at the end."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    from hdm_lightning.generation.jobs import draw_jobs  # noqa: PLC0415  (torch)

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{len(jobs)} pictures", total=None)
        drawn = draw_jobs(
            loaded.pipeline,
            jobs,
            image=album.image,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        for job, picture in drawn:
            album.add(job, picture)
    for path in album.paths:
        print(path)
    if arguments.sheet and len(jobs) > 1:
        print(album.write_sheet())


def _rounded(side: int, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


if __name__ == "__main__":
    raise SystemExit(main())
