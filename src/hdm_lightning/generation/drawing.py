"""Carry out a request of `hdm-sample`: prompts, settings and model come from the command or from an earlier image."""

import codecs
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hdm_lightning.errors import UserError
from hdm_lightning.generation.guided_branches import cut_prompts
from hdm_lightning.generation.image_files import ImageRecord, image_size, is_cropped, read_record, sha256_of
from hdm_lightning.generation.image_writer import DrawJob, ImageWriter, draw_jobs, plan_jobs
from hdm_lightning.generation.loading import LoadedModel, LoadOptions, load_pipeline
from hdm_lightning.generation.pipeline_adapters import AdapterUse, adapter_files, find_adapter
from hdm_lightning.generation.sampling_settings import MAX_SEED, DrawingMachine, DrawingRequest, SamplingSettings
from hdm_lightning.precision import default_dtype, dtype_name

SIZE_OF_IMAGE = "image"
LONGEST_PROMPT = 100_000
MOST_PROMPT_BYTES = 1 << 26
MOST_IMAGES = 1_000_000
"""Limits of one call. LONGEST_PROMPT is in characters: a tokenizer takes seconds and gigabytes for more."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and their encodings; UTF-32 comes first, as its mark begins with that of UTF-16."""
_OTHER_PROGRAMS = re.compile(r"\s--(?:n|w|h|d|l|s|cfg|neg|seed|steps)\s+\S")
"""Options of a single prompt, as in prompt files for kohya's scripts."""


def draw_request(
    request: DrawingRequest,
    machine: DrawingMachine,
    overrides: dict[str, Any],
    device: torch.device,
    *,
    warn: Callable[[str], None],
    progress: Callable[[str, int, int], None],
    load: Callable[[Path, LoadOptions], LoadedModel] = load_pipeline,
) -> list[Path]:
    """Generate images, write each as soon as it is done, then the contact sheet; return the files.

    Args:
        request, machine: what to generate, and with which model.
        overrides: `SamplingSettings` that replace those of the model or the earlier image.
        device: where to compute.
        warn: called with each warning.
        progress: called with (description, solver steps done, total steps).
        load: loads the model; frequent callers can return one from memory.

    Raises:
        UserError: something is missing or does not fit; names the option.
    """
    record = None if request.repeat is None else read_record(request.repeat)
    if record is None and request.model is None:
        raise UserError("is missing", where="MODEL", hint="give a run's folder, or --repeat PNG")
    prompts = _prompts(request, record, warn)
    image = request.image or (Path(record.image) if record and record.image else None)
    if "strength" in overrides and image is None:
        raise UserError("needs an image to start from", where="--strength", hint="add --image FILE")
    if image is not None and not image.is_file():
        raise UserError("does not exist", where=str(image), hint="pass an existing start image with --image FILE")
    loaded_with = loading_choices(request.model, machine, record, device)
    uses = adapter_uses(request.model, machine, record)
    model = request.model or (record.model if record else "")
    loaded = load(Path(model), _options(machine, device, loaded_with, uses))
    if loaded.notice:
        warn(loaded.notice)
    jobs = _jobs(request, overrides, prompts, loaded, record, image, warn)
    writer = _writer(request.out, loaded, image, loaded_with, uses)
    for told in cut_prompts(prompts, loaded.pipeline.caption_tokenizer):
        warn(told)
    for what in writer.differences_from(record) if record else []:
        warn(f"{request.repeat}: {what}")
    what = f"{len(jobs)} image{'s' if len(jobs) > 1 else ''}"
    for job, drawn in draw_jobs(loaded.pipeline, jobs, image=image, progress=lambda *steps: progress(what, *steps)):
        writer.add(job, drawn)
    return [*writer.paths, *([writer.write_sheet()] if request.sheet and len(jobs) > 1 else [])]


def _writer(
    folder: Path, loaded: LoadedModel, image: Path | None, loaded_with: dict[str, str], uses: tuple[AdapterUse, ...]
) -> ImageWriter:
    """Create the writer, which also records what the images are made with."""
    try:
        return ImageWriter(
            folder,
            model=str(loaded.path),
            fingerprint=loaded.fingerprint,
            image=image,
            loaded_with=loaded_with,
            loras=[
                {"name": use.name, "weight": use.weight, "sha256": sha256_of(*adapter_files(find_adapter(use.name)))}
                for use in uses
            ],
        )
    except OSError as error:
        raise UserError(f"cannot be created ({error})", where=f"--out {folder}", hint="use a folder") from error


def _prompts(request: DrawingRequest, record: ImageRecord | None, warn: Callable[[str], None]) -> list[str]:
    """Return the prompts of the command line and the file, else that of the image to repeat, else standard input's."""
    prompts, file = [prompt.strip() for prompt in request.prompts], request.prompt_file
    for prompt in prompts:
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in prompt):  # Python's escapes for bytes that are not UTF-8
            what = f"{prompt[:40]!r} contains bytes that are not UTF-8"
            raise UserError(what, where="prompts", hint="convert them: iconv -f LATIN1 -t UTF-8 OLD > NEW")
    if record is not None and not prompts and not file:
        return [record.prompt]
    if file and file != "-":
        try:
            with open(file, "rb") as content:  # or a pipe, such as <(head -5 PROMPTS)
                prompts += _prompt_lines(content.read(MOST_PROMPT_BYTES + 1), f"--prompts {file}", warn)
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
            raise UserError(what, where=f"--prompts {file}", hint="use a file with one prompt per line") from error
    elif file or (not prompts and not sys.stdin.isatty()):
        read = getattr(sys.stdin, "buffer", sys.stdin).read(MOST_PROMPT_BYTES + 1)
        prompts += _prompt_lines(read if isinstance(read, bytes) else read.encode(), "standard input", warn)
    if not prompts:
        hint = 'pass them as arguments, hdm-sample MODEL "a red circle", with --prompts FILE, or on standard input'
        raise UserError("there are none", where="prompts", hint=hint)
    if (longest := max(map(len, prompts))) > LONGEST_PROMPT:
        what = f"one has {longest:,} characters, more than {LONGEST_PROMPT:,}"
        raise UserError(what, where="prompts", hint="shorten it; the model reads a few hundred words at most")
    return prompts


def _prompt_lines(content: bytes, where: str, warn: Callable[[str], None]) -> list[str]:
    """Parse one prompt per line, without blank lines and comments: UTF-8, or UTF-16 or UTF-32 with a mark."""
    if len(content) > MOST_PROMPT_BYTES:
        what = f"has more than {MOST_PROMPT_BYTES:,} bytes"
        raise UserError(what, where=where, hint="use a part of it at a time: split -l 10000 PROMPTS")
    marked = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        lines = [line.strip() for line in content.decode(marked).split("\n")]
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {error.start})"
        raise UserError(what, where=where, hint="convert it: iconv -f LATIN1 -t UTF-8 OLD > NEW") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if comments := sum(line.startswith("#") for line in lines):
        warn(f"{where}: {comments} line(s) that begin with # are skipped as comments")
    if foreign := [line for line in prompts if _OTHER_PROGRAMS.search(line)]:
        what = f"{foreign[0][:60]!r} has options of another program, which are read as text"
        warn(f"{where}: {what}; here --negative-prompt, --size, --seed and the like apply to all prompts")
    return prompts


def loading_choices(
    model: str | None, machine: DrawingMachine, record: ImageRecord | None, device: torch.device
) -> dict[str, str]:
    """Return the precision and the encoders to load: the command's, else those of the image to repeat.

    If the command names a model, its own encoders are used, and only the precision comes from the image.
    """
    known = {"precision": dtype_name(default_dtype(device)), **(record.loaded_with if record else {})}
    if model is not None:
        known = {"precision": known["precision"]}
    given = {"precision": machine.precision, "text_encoder": machine.text_encoder, "vae": machine.vae}
    return known | {name: value for name, value in given.items() if value is not None}


def adapter_uses(model: str | None, machine: DrawingMachine, record: ImageRecord | None) -> tuple[AdapterUse, ...]:
    """Return the adapters to use: the command's, else, unless it names a model, those of the image to repeat."""
    if machine.lora or record is None or model is not None:
        return tuple(map(AdapterUse.parse, machine.lora))
    return tuple(AdapterUse(each["name"], each["weight"]) for each in record.loras)


def _options(
    machine: DrawingMachine, device: torch.device, loaded_with: dict[str, str], uses: tuple[AdapterUse, ...]
) -> LoadOptions:
    precision = loaded_with["precision"]
    return LoadOptions(
        device=device,
        autocast=None if precision == "float32" else getattr(torch, precision),
        weights=machine.weights,
        text_encoder=loaded_with.get("text_encoder"),
        vae=loaded_with.get("vae"),
        max_batch=machine.batch,
        compiled=machine.compile,
        adapters=uses,
        any_base=machine.any_base,
    )


def _jobs(
    request: DrawingRequest,
    overrides: dict[str, Any],
    prompts: list[str],
    loaded: LoadedModel,
    record: ImageRecord | None,
    image: Path | None,
    warn: Callable[[str], None],
) -> list[DrawJob]:
    """Plan the images, with the repeated image's settings or the model's own, overridden by the command's."""
    base = {**(record.settings.to_json() if record else loaded.sampling), **overrides}
    sizes = [_size(text, image) for text in request.size] or [{}]
    try:
        settings = [SamplingSettings.from_json({**base, **size}) for size in sizes]
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where="settings", hint="see hdm-sample --help") from error
    for one in settings:
        _check_size(one, loaded.pipeline.size_multiple)
        if image is not None and is_cropped(image, one):
            size = f"{one.width}x{one.height}"
            warn(f"{image} is scaled and center-cropped to {size}; --size image keeps all of it")
    seed = request.seed if request.seed is not None else (record.seed if record else 0)
    if (images := request.count * len(prompts) * len(settings)) > MOST_IMAGES:
        what = f"{images:,} images exceed the limit of one call ({MOST_IMAGES:,})"
        raise UserError(what, where="--count", hint="use a smaller count, then continue with --seed")
    if seed + request.count - 1 > MAX_SEED:
        raise UserError(f"counts up to {seed + request.count - 1}", where="--seed", hint=f"stay within {MAX_SEED}")
    return plan_jobs(prompts, seed, request.count, settings)


def _size(text: str, image: Path | None) -> dict[str, int]:
    """Return width and height from WIDTHxHEIGHT or from the start image."""
    text = text.strip().lower()
    if text == SIZE_OF_IMAGE:
        if image is None:
            raise UserError("needs an image to start from", where="--size image", hint="add --image FILE")
        return dict(zip(("width", "height"), image_size(image), strict=True))
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None:
        raise UserError(f"{text!r} is not a size", where="--size", hint="use WIDTHxHEIGHT, as in 768x512")
    return {"width": int(match[1]), "height": int(match[2])}


def _check_size(settings: SamplingSettings, multiple: int) -> None:
    if settings.on_indivisible == "refuse" and (settings.height % multiple or settings.width % multiple):
        near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (settings.width, settings.height))
        what = f"both sides of {settings.width}x{settings.height} must be multiples of {multiple}"
        raise UserError(what, where="--size", hint=f"use {near}, or add --on-indivisible pad")
