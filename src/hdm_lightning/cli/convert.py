"""hdm-convert: convert a trained network between file layouts, or describe a file."""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from hdm_lightning.cli.arguments import Flags, IntermixedParser
from hdm_lightning.cli.command import run_command
from hdm_lightning.errors import UserError, first_line
from hdm_lightning.printable import in_one_line, printable
from hdm_lightning.whole_files import new_folder

if TYPE_CHECKING:
    from hdm_lightning.interop.release import Release
    from hdm_lightning.models import XUTConfig

Target = Literal[
    "project", "single", "published", "comfyui", "diffusers", "bare", "peft", "lora", "lora_comfyui", "lycoris"
]
TARGETS = {
    "project": "a pipeline folder, for HDMPipeline, hdm-sample and hdm-train init=",
    "single": "one self-contained .safetensors of any wiring, for this project's ComfyUI nodes and commands",
    "published": "one file, .safetensors or .ckpt, with all tensors under the published names",
    "comfyui": "one float16 file with the autoencoder: published for the published wiring, else single",
    "diffusers": "the published folder with unet/ (which no diffusers class reads) and vae/ (an AutoencoderKL)",
    "bare": "one file with only the network under the published names",
    "peft": "for a LoRA: a peft folder, for PeftModel, load_lora_weights and --lora",
    "lora": "for a LoRA: one file under diffusers' names (transformer.….lora_A.weight)",
    "lora_comfyui": "for a LoRA: one file under ComfyUI's names (diffusion_model.….lora_A.weight)",
    "lycoris": "for a LoRA, LoHa or LoKr: one file under lycoris-lora's names (lycoris_….lokr_w1)",
}
SINGLE_FILES = ("single", "published", "comfyui", "bare", "lora", "lora_comfyui", "lycoris")
ADAPTERS = ("peft", "lora", "lora_comfyui", "lycoris")
"""Layouts for a LoRA alone; the others merge it into its base."""
_OF_MODELS = ("vae", "text_encoder", "lora", "any_base", "copy", "average", "samples")
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Suffixes of single files, which determine the format to read and write."""


@dataclass(frozen=True)
class Conversion:
    """The arguments of hdm-convert.

    Attributes:
        source: a run folder, pipeline folder, diffusers folder or file; a LoRA is merged into its base.
        destination: file or folder to write; if omitted, the source is described.
        to: layout to write (default: project; for a file name, published if the wiring is, else single).
        dtype: cast all tensors (default: as stored; comfyui: float16).
        vae: folder of an autoencoder to use instead.
        text_encoder: name or folder to record in a pipeline folder.
        lora: merge this LoRA into the source, NAME or NAME:WEIGHT; repeatable.
        any_base: also merge a LoRA that was trained on other weights of this shape.
        copy: if a file contains several copies of the network, the key or name of the one to use, e.g. ema.
        average: for a run with callbacks.weight_averages.sigma_rel: average with this relative width, e.g. 0.08.
        samples: with --average: number of samples seen (default: the end).
        force: overwrite the destination.
    """

    source: Path
    destination: Path | None = None
    to: Target | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    vae: Path | None = None
    text_encoder: str | None = None
    lora: list[str] = field(default_factory=list)
    any_base: bool = False
    copy: str | None = None
    average: float | None = None
    samples: int | None = None
    force: bool = False


_CONVERSION = Flags(
    Conversion,
    {"source": "source", "destination": "destination", "average": "--average WIDTH", "lora": "--lora NAME[:WEIGHT]"},
)


def parser() -> IntermixedParser:
    """Return the command's parser."""
    layouts = "\n".join(f"  {name:10} {text}" for name, text in TARGETS.items())
    result = IntermixedParser(
        prog="hdm-convert",
        description="Convert a trained network between layouts, bit for bit unless --dtype says otherwise.",
        epilog=f"layouts:\n{layouts}",
    )
    _CONVERSION.add(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Convert or describe, and return the exit status."""
    return run_command(lambda: _convert(_CONVERSION.read(parser().parse_args(argv))))


def _convert(asked: Conversion) -> None:
    from hdm_lightning.interop.adapter_files import is_adapter  # noqa: PLC0415  (imports torch; keeps --help fast)
    from hdm_lightning.interop.layouts import detect_layout  # noqa: PLC0415  (as above)

    source, destination = asked.source, asked.destination
    if is_adapter(source) and (destination is None or asked.to in ADAPTERS):
        _convert_adapter(asked)
        return
    if asked.to in ADAPTERS:
        raise UserError(
            "is not a LoRA", where=str(source), hint=f"--to {asked.to} needs one: use the run that trained it"
        )
    layout, release = ("merged LoRA" if is_adapter(source) else detect_layout(source)), _read(asked)
    if destination is None:
        print(f"{in_one_line(source)}: {layout}\n{describe(release)}")
        return
    target = asked.to or _usual_target(release, destination)
    _check_destination(destination, target, asked.force)
    _write(release, destination, target, asked)
    print(f"{destination}: {target}, from {layout} {source}")


def _usual_target(release: "Release", destination: Path) -> Target:
    if not destination.suffix:
        return "project"
    return "published" if release.network.config.is_published_wiring else "single"


def _check_destination(destination: Path, target: str, force: bool) -> None:
    """Raise UserError if the layout cannot be written to this path or read back from it, or if it would overwrite."""
    if destination.exists() and not force:
        raise UserError("already exists", where=str(destination), hint="choose another name, or add --force")
    single = target in SINGLE_FILES
    if single and destination.suffix not in SUFFIXES:
        raise UserError(
            f"the suffix {destination.suffix!r} is unknown, and --to {target} writes one file",
            where=str(destination),
            hint=f"use {' or '.join(SUFFIXES[:2])}, or --to project for a folder",
        )
    if destination.exists() and destination.is_dir() == single:
        kinds = ("folder", "file") if single else ("file", "folder")
        what = f"is a {kinds[0]}, and --to {target} writes a {kinds[1]}"
        raise UserError(what, where=str(destination), hint="choose another name")


@contextmanager
def _place(destination: Path, target: str) -> Iterator[Path]:
    """Yield where to write: a new folder gets its name once it is whole; files are replaced one by one.

    Raises:
        UserError: nothing can be written there.
    """
    in_place = target in SINGLE_FILES or destination.exists()
    try:
        with nullcontext(destination) if in_place else new_folder(destination) as place:
            yield place
    except (OSError, SafetensorError) as error:
        hint = "choose a place that is writable and has room"
        raise UserError(f"cannot be written ({error})", where=str(destination), hint=hint) from error


def _read(asked: Conversion) -> "Release":
    from hdm_lightning.interop.adapter_files import is_adapter  # noqa: PLC0415  (imports torch; keeps --help fast)
    from hdm_lightning.interop.layouts import read_release, with_vae  # noqa: PLC0415  (as above)
    from hdm_lightning.interop.network_copies import told  # noqa: PLC0415  (as above)

    release = _merged(asked) if asked.lora or is_adapter(asked.source) else read_release(asked.source, asked.copy)
    if release.copies:
        print(f"warning: {in_one_line(told(asked.source, release.copies))}", file=sys.stderr)
    if release.left_out:
        shown = ", ".join(map(in_one_line, release.left_out[:5]))
        print(f"warning: ignoring {len(release.left_out)} tensors outside a model: {shown} …", file=sys.stderr)
    if asked.average is not None:
        release = _averaged(release, asked, asked.average)
    elif asked.samples is not None:
        raise UserError("only applies to --average", where="--samples", hint="add --average WIDTH, e.g. --average 0.08")
    return with_vae(release, asked.vae) if asked.vae else release


def _convert_adapter(asked: Conversion) -> None:
    """Convert a LoRA to another layout, or describe it."""
    import torch  # noqa: PLC0415  (keeps --help fast)

    from hdm_lightning.interop import adapter_files as files  # noqa: PLC0415  (as above)

    for name, value in vars(asked).items():
        if name in _OF_MODELS and value is not None and value is not False and value != []:
            option, what = f"--{name.replace('_', '-')}", "is for whole models, not for a LoRA alone"
            hint = f"omit it, or write the merged model: --to project {option} …"
            raise UserError(what, where=option, hint=hint)
    adapter, destination = files.read_adapter(asked.source), asked.destination
    if destination is None:
        print(f"{in_one_line(asked.source)}: adapter\n{files.describe_adapter(adapter)}")
        return
    _check_destination(destination, str(asked.to), asked.force)
    cast = adapter if asked.dtype is None else adapter.cast(getattr(torch, asked.dtype))
    with _place(destination, str(asked.to)) as place:
        if asked.to == "peft":
            files.write_adapter_folder(place, files.for_others(cast))
        else:
            files.write_adapter_file(place, files.for_others(cast), str(asked.to))
    print(f"{destination}: {asked.to}, from LoRA {asked.source}")


def _merged(asked: Conversion) -> "Release":
    """Return the base with the requested LoRAs merged into its weights."""
    from hdm_lightning.generation.loading import adapter_and_base  # noqa: PLC0415  (imports torch; keeps --help fast)
    from hdm_lightning.generation.pipeline_adapters import AdapterUse, find_adapter  # noqa: PLC0415  (as above)
    from hdm_lightning.interop import adapter_files, adapters, layouts  # noqa: PLC0415  (as above)

    uses = [(each, find_adapter(each.name)) for each in map(AdapterUse.parse, asked.lora)]
    source, found = asked.source, []
    if adapter_files.is_adapter(source):
        adapter, source = adapter_and_base(source)
        found = [(adapter, 1.0, str(asked.source))]
    release = layouts.read_release(source, asked.copy)
    config, state = release.network.config, release.network.state_dict()
    found += [(adapter_files.read_adapter(path, config), use.weight, use.name) for use, path in uses]
    for adapter, _, name in found:
        adapters.check_adapter(adapter, state, where=name, any_base=asked.any_base)
    release.network.load_state_dict(adapters.merged(state, [(adapter, weight) for adapter, weight, _ in found]))
    merged_in = [{"lora": adapter_files.shown_name(name), "weight": weight} for _, weight, name in found]
    training = {**release.settings.get("training", {}), "merged": merged_in}
    return replace(release, settings={**release.settings, "training": training})


def _averaged(release: "Release", asked: Conversion, width: float) -> "Release":
    """Return the release with its weights replaced by another average of the run."""
    from hdm_lightning.training.averaging.power_function import FOLDER, reconstruct  # noqa: PLC0415  (imports torch)

    found = reconstruct(asked.source / FOLDER, width, asked.samples)
    network = copy.deepcopy(release.network).float()
    try:
        network.load_state_dict({**network.state_dict(), **found.tensors})
    except RuntimeError as error:
        raise UserError(
            f"the stored averages do not match the run's network: {first_line(error)}",
            where=str(asked.source / FOLDER),
            hint="use the folder of the run that stored them",
        ) from error
    print(
        printable(
            f"average of relative width {width:g} at {found.samples:,} samples, from {found.used} stored; "
            f"its profile is matched to within {found.misfit:.2%}"
        )
    )
    return replace(release, network=network)


def _write(release: "Release", destination: Path, target: str, asked: Conversion) -> None:
    import torch  # noqa: PLC0415  (keeps --help fast)

    from hdm_lightning.interop import layouts  # noqa: PLC0415

    dtype = asked.dtype or ("float16" if target == "comfyui" else None)
    try:
        cast = release if dtype is None else release.cast(getattr(torch, dtype))
        more = [asked.text_encoder] if target == "project" else []
        with _place(destination, target) as place:
            getattr(layouts, f"write_{target}")(place, cast, *more)
    except UserError:
        raise
    except ValueError as error:
        hint = "use --to single or project, train with the published wiring, or add what is missing"
        raise UserError(str(error), where=f"--to {target}", hint=hint) from error
    if target == "comfyui":
        _say_who_reads(release)


def _say_who_reads(release: "Release") -> None:
    """Print which ComfyUI loaders can read the file: HDM-ext supports only XUT-base as released."""
    from hdm_lightning.interop import published  # noqa: PLC0415  (imports torch; keeps --help fast)

    config = release.network.config
    if not config.is_published_wiring:
        named = ", ".join(f"{name} {getattr(config, name)}" for name in _differing(config))
        print(
            f"single file with a different wiring ({named}): this project's ComfyUI nodes can read it, HDM-ext cannot"
        )
        return
    unlike = [f"{key} {getattr(config, key)}" for key in _differing(config)]
    text = (release.settings.get("text_encoder") or {}).get("name")
    if text not in (None, published.TEXT_ENCODERS[1024]):
        unlike.append(f"text encoder {text}")
    if not published.is_usual_normalisation(release.vae_mean, release.vae_std):
        unlike.append("mean and std of the latents")
    if unlike:
        what = "the published loader (HDM-ext) hard-codes other values, and fails or generates wrong images"
        print(f"warning: {what}: {in_one_line(', '.join(unlike))}; this project's nodes can read it", file=sys.stderr)


def _differing(config: "XUTConfig") -> list[str]:
    """Return the fields that differ from the released network's configuration, initialization aside."""
    from hdm_lightning.models.config import preset_fields  # noqa: PLC0415  (imports torch; keeps --help fast)

    known = {key: value for key, value in preset_fields("published").items() if key != "rope_init"}
    return [key for key, value in config.to_json().items() if key in known and value != known[key]]


def describe(release: "Release") -> str:
    """Describe a release, one fact per line."""
    from hdm_lightning.interop.model_card import recorded_license  # noqa: PLC0415  (imports torch; keeps --help fast)
    from hdm_lightning.models.config import WIRING  # noqa: PLC0415  (as above)

    config, settings = release.network.config, release.settings
    wiring = ", ".join(f"{name} {getattr(config, name)}" for name in WIRING)
    parameters = sum(parameter.numel() for parameter in release.network.parameters())
    text = settings.get("text_encoder")
    lines = [
        f"network       {parameters:,} parameters, {release.network.patch_embedding.weight.dtype}",
        f"wiring        {wiring}" + (" (published)" if config.is_published_wiring else ""),
        *(f"  {name:20} {value}" for name, value in config.to_json().items()),
        f"autoencoder   {_tensors(release.vae)}",
        f"vae_mean      {None if release.vae_mean is None else release.vae_mean.flatten().tolist()}",
        f"vae_std       {None if release.vae_std is None else release.vae_std.flatten().tolist()}",
        f"text encoder  {_tensors(release.text_encoder)}" + (f" included; trained with {text['name']}" if text else ""),
        f"license       {recorded_license(settings.get('training') or {}) or 'not stated'}",
    ]
    return "\n".join(map(in_one_line, lines))


def _tensors(tensors: Mapping[str, Any]) -> str:
    return f"{len(tensors)} tensors" if tensors else "none"


if __name__ == "__main__":
    raise SystemExit(main())
