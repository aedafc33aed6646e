"""hdm-sample: images from prompts, from a run, a trained model or a published file."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from annotated_types import Ge

from hdm_lightning.cli.arguments import Flags, Parser
from hdm_lightning.cli.command import run_command
from hdm_lightning.errors import UserError, did_you_mean
from hdm_lightning.generation.sampling_settings import MAX_SEED, SamplingSettings
from hdm_lightning.printable import in_one_line
from hdm_lightning.version import __version__

if TYPE_CHECKING:
    import torch

    from hdm_lightning.generation.image_files import ImageRecord
    from hdm_lightning.generation.image_writer import DrawJob, ImageWriter
    from hdm_lightning.generation.loading import LoadedModel

SIZE_OF_IMAGE = "image"

_DESCRIPTION = """Draw images from prompts.

MODEL is a run's folder (its final/ is used), a pipeline's folder, a weights file inside one, a hub name, or a published
network: a single file (.safetensors, .ckpt) or a diffusers folder. Prompts come from the command line, from
--prompts FILE, or, if there are neither, one a line from standard input. Every PNG carries its settings; --repeat
draws it again."""

_EXAMPLES = """examples:
  hdm-sample runs/shapes "a large red circle" --count 4
  hdm-sample runs/shapes --prompts prompts.txt --size 512x512 --size 768x384
  hdm-sample --repeat samples/0000-a-large-red-circle-0.png --steps 50
  hdm-sample runs/shapes "a star" --image sketch.png --strength 0.6 --size image --on-indivisible pad
"""


@dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        prompt_file: one prompt a line; - is standard input.
        count: images of each prompt.
        seed: first seed, counted up (default: 0).
        size: in pixels, or: image, that of --image; may be repeated.
        repeat: draw this image again from its own settings.
        image: start from this image (image-to-image).
        out: folder.
        sheet: a contact sheet where there are several images.
    """

    prompt_file: str | None = None
    count: Annotated[int, Ge(1)] = 1
    seed: Annotated[int | None, Ge(0)] = None
    size: list[str] = field(default_factory=list)
    repeat: Path | None = None
    image: Path | None = None
    out: Path = Path("samples")
    sheet: bool = True


@dataclass(frozen=True)
class Machine:
    """Which model, and where.

    Attributes:
        weights: averaged or last weights.
        text_encoder, vae: name or folder instead of the model's own.
        device: cpu, cuda, cuda:1 … (default: cuda if there is one).
        precision: of the network (default: float32 on cpu, bfloat16 or float16 on cuda, as the card computes in it).
        batch: images at once.
    """

    weights: Literal["ema", "raw"] = "ema"
    text_encoder: str | None = None
    vae: str | None = None
    device: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    batch: Annotated[int, Ge(1)] = 8


_HINTS = get_type_hints(SamplingSettings)
Overrides = make_dataclass(
    "Overrides",
    [(each.name, _HINTS[each.name], None) for each in fields(SamplingSettings) if each.name not in ("height", "width")],
    namespace={"__doc__": SamplingSettings.__doc__},
)
"""The settings of which an option is given; the others are the model's own."""

_REQUEST = Flags(
    Request,
    {
        "prompt_file": "--prompts FILE",
        "size": "--size WIDTHxHEIGHT",
        "repeat": "--repeat PNG",
        "image": "--image FILE",
        "out": "--out DIR",
    },
)
_OVERRIDES: Flags[Any] = Flags(
    Overrides,
    {
        "guidance_scale": "--guidance",
        "routing_scale": "--routing-guidance",
        "conditional_rate": "--rate",
        "unconditional_rate": "--negative-rate",
    },
)
_MACHINE = Flags(Machine)


class _IntermixedParser(Parser):
    """Prompts may stand between options, which argparse reads in two turns, with arguments left over by the first."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super(Parser, self).parse_known_args(args, namespace)


def parser() -> Parser:
    """The command's arguments."""
    command = _IntermixedParser(prog="hdm-sample", description=_DESCRIPTION, epilog=_EXAMPLES)
    command.add_argument("model", nargs="?", metavar="MODEL", help="run, pipeline's folder, weights file or hub name")
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    command.add_argument("--version", action="version", version=f"hdm-lightning {__version__}")
    _REQUEST.add(command.add_argument_group("what to draw"))
    _OVERRIDES.add(command.add_argument_group("how to draw it (defaults: the model's own)"))
    _MACHINE.add(command.add_argument_group("model and machine"))
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Draw images; returns the exit status."""
    return run_command(lambda: _sample(argv))


def _sample(argv: Sequence[str] | None) -> None:
    command = parser()
    given, unknown = command.parse_known_intermixed_args(argv)
    if unknown:
        known = [option for action in command._actions for option in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]!r}", where="hdm-sample", hint=did_you_mean(unknown[0], known))
    request, machine = _REQUEST.read(given), _MACHINE.read(given)
    overrides = {key: value for key, value in vars(_OVERRIDES.read(given)).items() if value is not None}
    _draw(given.model, given.prompts, request, machine, overrides)


def _draw(model: str | None, prompts: list[str], request: Request, machine: Machine, overrides: dict[str, Any]) -> None:
    """Draw, write each image as soon as it is there, and the contact sheet at the end."""
    from hdm_lightning.generation.image_writer import ImageWriter, draw_jobs  # noqa: PLC0415  (torch, for --help's sake)

    record = _record_to_repeat(model, request)
    if record is None or prompts or request.prompt_file:
        prompts = _all_prompts(prompts, request.prompt_file)
    else:
        prompts = [record.prompt]
    if "strength" in overrides and not (request.image or record):
        raise UserError("is given without an image to start from", where="--strength", hint="add --image FILE")
    image = _start_image(request, record)
    device = _device(machine.device)
    loaded_with = _loaded_with(model, machine, record, device)
    loaded = _load(model or (record.model if record else ""), machine, device, loaded_with)
    jobs = _jobs(request, overrides, prompts, loaded, record, image)
    fingerprint = loaded.fingerprint
    try:
        writer = ImageWriter(
            request.out, model=str(loaded.path), fingerprint=fingerprint, image=image, loaded_with=loaded_with
        )
    except OSError as error:
        raise UserError(f"cannot be made ({error})", where=f"--out {request.out}", hint="give a folder") from error
    _warn_of_differences(prompts, loaded, writer, record, request.repeat)
    with _progress_bar(len(jobs)) as report:
        for job, drawn in draw_jobs(loaded.pipeline, jobs, image=image, progress=report):
            writer.add(job, drawn)
    for path in [*writer.paths, *([writer.write_sheet()] if request.sheet and len(jobs) > 1 else [])]:
        print(path)


def _record_to_repeat(model: str | None, request: Request) -> "ImageRecord | None":
    """The record of the image to repeat, if one is to be repeated."""
    from hdm_lightning.generation.image_files import read_record  # noqa: PLC0415  (torch, for --help's sake)

    if request.repeat is not None:
        return read_record(request.repeat)
    if model is None:
        raise UserError("is missing", where="MODEL", hint="give a run's folder, or --repeat PNG")
    return None


def _all_prompts(prompts: list[str], file: str | None) -> list[str]:
    """The prompts from the command line and the file, or else from standard input.

    Raises:
        UserError: if there are none, or the file cannot be read.
    """
    if file and file != "-":
        try:
            prompts = [*prompts, *Path(file).read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read ({error})", where=f"--prompts {file}") from error
    elif file or (not prompts and not sys.stdin.isatty()):
        prompts = [*prompts, *sys.stdin.read().splitlines()]
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(
            "there are none",
            where="prompts",
            hint='give them as arguments, hdm-sample MODEL "a red circle", with --prompts FILE, or on standard input',
        )
    return prompts


def _start_image(request: Request, record: "ImageRecord | None") -> Path | None:
    """The image to start from: the one given, or the one that the image to repeat started from."""
    image = request.image or (Path(record.image) if record and record.image else None)
    if image is not None and not image.is_file():
        raise UserError("does not exist", where=str(image), hint="give the image to start from with --image FILE")
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


def _loaded_with(
    model: str | None, machine: Machine, record: "ImageRecord | None", device: "torch.device"
) -> dict[str, str]:
    """Precision and named encoders: from the command, else from the image to repeat.

    Where the command names another model than the image's, that model's own encoders serve.
    """
    from hdm_lightning.precision import default_dtype, dtype_name  # noqa: PLC0415  (torch, for --help's sake)

    known = {"precision": dtype_name(default_dtype(device)), **(record.loaded_with if record else {})}
    if model is not None:
        known = {"precision": known["precision"]}
    given = {"precision": machine.precision, "text_encoder": machine.text_encoder, "vae": machine.vae}
    return known | {name: value for name, value in given.items() if value is not None}


def _load(model: str, machine: Machine, device: "torch.device", loaded_with: dict[str, str]) -> "LoadedModel":
    import torch  # noqa: PLC0415  (seconds to import, for --help's sake)

    from hdm_lightning.generation.loading import LoadOptions, load_pipeline  # noqa: PLC0415

    precision = loaded_with["precision"]
    options = LoadOptions(
        device=device,
        autocast=None if precision == "float32" else getattr(torch, precision),
        weights=machine.weights,
        text_encoder=loaded_with.get("text_encoder"),
        vae=loaded_with.get("vae"),
        max_batch=machine.batch,
    )
    return load_pipeline(Path(model), options)


def _jobs(
    request: Request,
    overrides: dict[str, Any],
    prompts: list[str],
    loaded: "LoadedModel",
    record: "ImageRecord | None",
    image: Path | None,
) -> "list[DrawJob]":
    """What to draw: the image's settings or the model's own, overridden by what the command says."""
    from hdm_lightning.generation.image_writer import plan_jobs  # noqa: PLC0415  (torch, for --help's sake)

    base = {**(record.settings.to_json() if record else loaded.sampling), **overrides}
    sizes = [_size(text, image) for text in request.size] or [{}]
    try:
        settings = [SamplingSettings.from_json({**base, **size}) for size in sizes]
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where="settings", hint="see hdm-sample --help") from error
    for one in settings:
        _check_size(one, loaded.pipeline.size_multiple, image)
    seed = request.seed if request.seed is not None else (record.seed if record else 0)
    if seed + request.count - 1 > MAX_SEED:
        raise UserError(f"counts up to {seed + request.count - 1}", where="--seed", hint=f"stay within {MAX_SEED}")
    return plan_jobs(prompts, seed, request.count, settings)


def _size(text: str, image: Path | None) -> dict[str, int]:
    """Width and height of WIDTHxHEIGHT, or of the image to start from."""
    from hdm_lightning.generation.image_files import image_size  # noqa: PLC0415  (torch, for --help's sake)

    text = text.strip().lower()
    if text == SIZE_OF_IMAGE:
        if image is None:
            raise UserError("image means the one to start from", where="--size image", hint="add --image FILE")
        return dict(zip(("width", "height"), image_size(image), strict=True))
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None:
        raise UserError(f"{text!r} is no size", where="--size", hint="give WIDTHxHEIGHT, as in 768x512")
    return {"width": int(match[1]), "height": int(match[2])}


def _check_size(settings: SamplingSettings, multiple: int, image: Path | None) -> None:
    """Refuse a size that does not fit, and say so if the image to start from is cut to it."""
    from hdm_lightning.generation.image_files import is_cropped  # noqa: PLC0415  (torch, for --help's sake)

    size = f"{settings.width}x{settings.height}"
    if settings.on_indivisible == "refuse" and (settings.height % multiple or settings.width % multiple):
        near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (settings.width, settings.height))
        raise UserError(
            f"{size} is not made of multiples of {multiple}",
            where="--size",
            hint=f"give {near}, or add --on-indivisible pad",
        )
    if image is not None and is_cropped(image, settings):
        _warn(f"{image} is scaled and cut about its centre to {size}; --size image keeps all of it")


def _warn_of_differences(
    prompts: list[str], loaded: "LoadedModel", writer: "ImageWriter", record: "ImageRecord | None", repeat: Path | None
) -> None:
    """Say which prompts reach the end of what the network reads, and what is not as it was for the image repeated."""
    tokenizer = loaded.pipeline.caption_tokenizer
    for prompt in dict.fromkeys(prompts):
        if tokenizer(prompt)[1] == tokenizer.context_length:
            what = f"{prompt[:40]!r}… fills the {tokenizer.context_length} tokens of text that the model reads"
            _warn(f"{what}; whatever comes after is left out")
    for what in writer.differences_from(record) if record else []:
        _warn(f"{what} is not the one that {repeat} was drawn with")


def _warn(text: str) -> None:
    print(f"warning: {in_one_line(text)}", file=sys.stderr)


@contextmanager
def _progress_bar(images: int) -> Iterator[Callable[[int, int], None]]:
    """Yields what takes (solver steps done, in all) and shows them on the terminal."""
    from rich.console import Console  # noqa: PLC0415  (for --help's sake)
    from rich.progress import Progress  # noqa: PLC0415  (as above)

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{images} images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    raise SystemExit(main())
