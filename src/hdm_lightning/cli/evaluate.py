"""`hdm-evaluate`: evaluate a model or an autoencoder; writes JSON, a table, TensorBoard and an image report."""

import argparse
import dataclasses
import difflib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm_lightning.cli.arguments import Flags, Parser
from hdm_lightning.cli.command import progress_bars, require_folder, run_command, table_console
from hdm_lightning.cli.evaluate_recorded import compare, count, trainings
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.request import (
    PARTS,
    Counts,
    EvaluationSettings,
    Intervals,
    Machine,
    ModelRequest,
    VaeRequest,
    ratios_from,
)
from hdm_lightning.generation.sampling_settings import SamplingChanges
from hdm_lightning.printable import in_one_line

if TYPE_CHECKING:
    from hdm_lightning.evaluation.findings import Evaluation

OTHERS = {"compare": compare, "trainings": trainings, "count": count}
"""Subcommands that work on recorded evaluations."""

OUTPUT_FOLDER = "evaluation"
PART_FAILED_STATUS = 1

_FEATURES = (
    "feature network: efficientnet_lite0 (default, offline), inception (torch-fidelity), timm:NAME, or a transformers "
    "vision model by hub name or folder"
)
_MODEL = Flags(ModelRequest, {"model": "MODEL", "parts": "--parts A,B,…", "size": "--size PX"})
_SETTINGS = Flags(EvaluationSettings)
_DRAWING: Flags[Any] = Flags(
    SamplingChanges, {"guidance_scale": "--guidance", "negative_prompt": "--negative-prompt TEXT"}
)
_DRAWN = ("steps", "solver", "shift", "guidance_scale", "negative_prompt")
_VAE = Flags(VaeRequest, {"folder": "FOLDER", "size": "--size PX"})
_DESCRIPTION = """Evaluate a model, with an interval for every number.

MODEL is a run folder, its final/ folder, a weights file in it, a published single file, or a training
checkpoint (.ckpt) inside its run folder. Real images come from the run's own settings or from --data and
--train-data. `hdm-evaluate vae FOLDER` evaluates an autoencoder instead; `compare A B` compares two evaluated models,
`trainings RUN…` summarizes several seeds, `count SHARE OTHER` computes the prompts needed to show a difference."""

_EXAMPLES = """
examples:
  hdm-evaluate runs/shapes
  hdm-evaluate runs/shapes --parts loss,kernel,camera --samples 500 --weights ema
  hdm-evaluate published.safetensors --data /my/shards --text-encoder /models/qwen3
  hdm-evaluate vae runs/vae --data /my/shards --size 256
  hdm-evaluate compare runs/first runs/second
  hdm-evaluate trainings runs/demo runs/demo_1 runs/demo_2 runs/demo_3 runs/demo_4
  hdm-evaluate count 0.95 0.90 --design-effect 5
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["hdm-evaluate", *given])
    if given[:1] and given[0] in OTHERS:
        return run_command(lambda: OTHERS[given[0]](given[1:]))
    if given[:1] == ["vae"]:
        return run_command(lambda: _evaluate_vae(_VAE.read(_vae_parser().parse_args(given[1:])), command))
    return run_command(lambda: _evaluate_model(_asked(given), command))


def _asked(given: Sequence[str]) -> ModelRequest:
    """Return the parsed request. Raises UserError: the first word is probably a mistyped subcommand."""
    several = len(given) > 1 and not given[1].startswith("-")
    meant = difflib.get_close_matches(given[0], ["vae", *OTHERS], n=1) if several else []
    if meant and not Path(given[0]).exists():
        raise UserError(f"{given[0]!r} is not known", where="hdm-evaluate", hint=f"did you mean '{meant[0]}'?")
    return _model_request(_model_parser().parse_args(given))


def _model_parser() -> Parser:
    parts = "\n".join(f"  {key:<11} {part.about}" for key, part in PARTS.items())
    parser = Parser("hdm-evaluate", description=_DESCRIPTION, epilog=f"parts:\n{parts}\n{_EXAMPLES}")
    _MODEL.add(parser, only=["model"])
    what = parser.add_argument_group("what to measure, and reference data")
    _MODEL.add(what, only=["parts"])
    _add_repeated(what, "--data", "folder of captioned reference shards")
    _add_repeated(what, "--train-data", "folder of training shards")
    _add_repeated(what, "--features", _FEATURES)
    _SETTINGS.add(what, only=["clip"])
    counts = parser.add_argument_group("how many")
    Flags(Counts).add(counts)
    ratios = "aspect ratios, e.g. 1:2,2:3,3:2,2:1 (default)"
    counts.add_argument("--ratios", dest="ratios_text", metavar="W:H,…", help=ratios)
    Flags(Intervals).add(parser.add_argument_group("seeds and intervals"))
    drawing = parser.add_argument_group("sampling (defaults: the model's own)")
    _MODEL.add(drawing, only=["size"])
    _DRAWING.add(drawing, only=_DRAWN)
    model = parser.add_argument_group("model")
    _add_repeated(model, "--weights", "ema, raw or file (default: all available)")
    _MODEL.add(model, only=["text_encoder", "vae", "precision"])
    Flags(Machine).add(parser.add_argument_group("output and machine"))
    return parser


def _model_request(given: argparse.Namespace) -> ModelRequest:
    settings = _SETTINGS.read(given)
    if given.ratios_text is not None:
        settings = dataclasses.replace(settings, ratios=ratios_from(given.ratios_text))
    drawing = {key: value for key, value in vars(_DRAWING.read(given)).items() if value is not None}
    return dataclasses.replace(_MODEL.read(given), settings=settings, drawing=drawing)


def _vae_parser() -> Parser:
    about = "Evaluate an autoencoder on held-out images, with an interval for every number."
    parser = Parser("hdm-evaluate vae", description=about)
    _VAE.add(parser, only=["folder", "size", "on_indivisible", "samples", "perceptual"])
    _add_repeated(parser, "--data", "folder of shards it was not trained on", required=True)
    _add_repeated(parser, "--features", _FEATURES)
    Flags(Intervals).add(parser.add_argument_group("seeds and intervals"))
    _VAE.add(parser.add_argument_group("output and machine"), only=["out", "device", "batch"])
    return parser


def _add_repeated(group: argparse._ActionsContainer, name: str, about: str, *, required: bool = False) -> None:
    """Add a repeatable flag that takes one value, so that a positional argument can follow it."""
    help_ = f"{about}; repeatable"
    group.add_argument(name, action="append", metavar="NAME", default=argparse.SUPPRESS, required=required, help=help_)


def _evaluate_model(request: ModelRequest, command: str) -> int:
    folder = _output_folder(request.out, request.model)
    import torch  # noqa: PLC0415  (seconds to import)

    from hdm_lightning.evaluation.evaluate_model import evaluate  # noqa: PLC0415
    from hdm_lightning.evaluation.report import keep_partial  # noqa: PLC0415
    from hdm_lightning.generation.loading import LoadOptions  # noqa: PLC0415
    from hdm_lightning.precision import default_dtype, dtype_name  # noqa: PLC0415
    from hdm_lightning.profiling.system import chosen_device  # noqa: PLC0415

    device = chosen_device(request.device or "auto")
    precision = request.precision or dtype_name(default_dtype(device))
    options = LoadOptions(
        device=device,
        autocast=None if precision == "float32" else getattr(torch, precision),
        text_encoder=request.text_encoder,
        vae=request.vae,
        max_batch=request.batch,
    )
    with progress_bars() as progress:
        evaluation = evaluate(request, options, progress, lambda found: keep_partial(found, folder))
    status = _show(evaluation, command, folder)
    _put_on_card(evaluation, request.model)
    return status


def _put_on_card(evaluation: "Evaluation", model: Path) -> None:
    """Add the headline figures of the averaged weights to the model card, if there is one."""
    from hdm_lightning.evaluation.report import headline  # noqa: PLC0415  (seconds to import)
    from hdm_lightning.interop.pipeline_folder import INDEX, record_measures  # noqa: PLC0415

    folder = next((each for each in (model / "final", model) if (each / INDEX).is_file()), None)
    figures = headline(evaluation, "ema")
    if folder is None or not figures:
        return
    try:
        record_measures(folder, figures)
    except (OSError, UserError) as error:  # the results are already in their own files
        print(f"warning: could not add the results to the model card: {in_one_line(str(error))}", file=sys.stderr)


def _evaluate_vae(request: VaeRequest, command: str) -> int:
    folder = _output_folder(request.out, request.folder)
    from hdm_lightning.evaluation.evaluate_autoencoder import evaluate_vae  # noqa: PLC0415
    from hdm_lightning.profiling.system import chosen_device  # noqa: PLC0415

    with progress_bars() as progress:
        evaluation = evaluate_vae(request, chosen_device(request.device or "auto"), progress)
    return _show(evaluation, command, folder)


def _output_folder(given: Path | None, model: Path) -> Path:
    """Return the folder for the results; by default inside the model's folder or, for a file, next to it."""
    folder = given or (model if model.is_dir() else model.parent) / OUTPUT_FOLDER
    return require_folder(folder, "--out")


def _show(evaluation: "Evaluation", command: str, folder: Path) -> int:
    """Write the files, print the table, the parts left out and the paths, and return the exit status."""
    from hdm_lightning.evaluation.report import result_table, write_outputs  # noqa: PLC0415

    paths = write_outputs(dataclasses.replace(evaluation, command=command), folder)
    table_console().print(result_table(evaluation))
    for one in evaluation.left_out:
        hint = f"; {one.hint}" if one.hint else ""
        print(in_one_line(f"left out: {one.part}: {one.why}{hint}"))
    for path in paths:
        print(in_one_line(path))
    for failed in evaluation.failed:
        print(f"error: {failed.part} ({failed.weights}) failed: {failed.error}", file=sys.stderr)
    return PART_FAILED_STATUS if evaluation.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
