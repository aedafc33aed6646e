"""`hdm-evaluate`: a model or an autoencoder measured, as JSON, a table, TensorBoard and a report with pictures."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hdm_lightning.cli.errors import run_command
from hdm_lightning.cli.evaluate_arguments import parse, parts_of, sampling_given, settings_given
from hdm_lightning.cli.outputs import require_folder
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

if TYPE_CHECKING:
    import torch

    from hdm_lightning.assessment.context import Progress
    from hdm_lightning.evaluation.results import Evaluation

OUTPUT_FOLDER = "evaluation"
PART_FAILED_STATUS = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    kind, arguments = parse(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: (_evaluate_vae if kind == "vae" else _evaluate_model)(arguments))


def _evaluate_model(arguments: argparse.Namespace) -> int:
    import torch  # noqa: PLC0415  (seconds to import, for --help's sake)

    from hdm_lightning.assessment.job import EvaluationRequest, evaluate  # noqa: PLC0415
    from hdm_lightning.assessment.outputs import keep_partial  # noqa: PLC0415
    from hdm_lightning.assessment.settings import EvaluationSettings  # noqa: PLC0415
    from hdm_lightning.generation.loading import LoadOptions  # noqa: PLC0415
    from hdm_lightning.precision import default_dtype, dtype_name  # noqa: PLC0415

    parts = parts_of(arguments)
    folder = _output_folder(arguments.out, arguments.model)
    device = _device(arguments)
    precision = arguments.precision or dtype_name(default_dtype(device))
    request = EvaluationRequest(
        model=arguments.model,
        settings=EvaluationSettings(**settings_given(arguments, EvaluationSettings)),
        options=LoadOptions(
            device=device,
            autocast=None if precision == "float32" else getattr(torch, precision),
            text_encoder=arguments.text_encoder,
            vae=arguments.vae,
            max_batch=arguments.batch,
        ),
        parts=parts,
        weights=tuple(arguments.weights) if arguments.weights else None,
        data=tuple(arguments.data),
        train_data=tuple(arguments.train_data),
        sampling=sampling_given(arguments),
    )
    with _bar() as progress:
        evaluation, samples_seen = evaluate(request, progress, lambda found: keep_partial(found, folder))
    return _show(evaluation, folder, samples_seen)


def _evaluate_vae(arguments: argparse.Namespace) -> int:
    from hdm_lightning.assessment.autoencoder import VaeRequest, evaluate_vae  # noqa: PLC0415
    from hdm_lightning.assessment.settings import EvaluationSettings  # noqa: PLC0415
    from hdm_lightning.evaluation.network_names import DEFAULT_NETWORK  # noqa: PLC0415

    out = _output_folder(arguments.out, arguments.folder)
    perceptual = arguments.perceptual or DEFAULT_NETWORK
    request = VaeRequest(
        folder=arguments.folder,
        data=tuple(arguments.data),
        resolution=arguments.size,
        settings=EvaluationSettings(**settings_given(arguments, EvaluationSettings)),
        perceptual=None if perceptual == "none" else perceptual,
        device=_device(arguments),
        batch=arguments.batch,
        on_indivisible=arguments.on_indivisible,
    )
    with _bar() as progress:
        evaluation = evaluate_vae(request, progress)
    return _show(evaluation, out, 0)


def _device(arguments: argparse.Namespace) -> "torch.device":
    import torch  # noqa: PLC0415  (seconds to import)

    if arguments.batch < 1:
        raise UserError(f"is {arguments.batch}, expected at least 1", where="--batch")
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is no device", where="--device", hint="give cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no CUDA device {device.index or 0}", where="--device", hint="give another, or cpu")
    return device


def _output_folder(given: Path | None, model: Path) -> Path:
    """The folder for the results; where none is given, in the model's or, for a file, beside it."""
    folder = given or (model if model.is_dir() else model.parent) / OUTPUT_FOLDER
    return require_folder(folder, "--out")


@contextlib.contextmanager
def _bar() -> "Iterator[Progress]":
    """A bar on stderr with one line for each thing that is being done."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield tell


def _show(evaluation: "Evaluation", folder: Path, samples_seen: int) -> int:
    """Write the files, print the table and what has no result, and name the files; the exit status."""
    from rich.console import Console  # noqa: PLC0415

    from hdm_lightning.assessment.outputs import write_outputs  # noqa: PLC0415
    from hdm_lightning.evaluation.report_table import result_table  # noqa: PLC0415

    paths = write_outputs(evaluation, folder, samples_seen)
    console = Console()
    console.print(result_table(evaluation))
    for one in evaluation.left_out:
        hint = f"; {one.hint}" if one.hint else ""
        line = in_one_line(f"left out: {one.part}: {one.why}{hint}")
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for path in paths:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    for failed in evaluation.failed:
        print(f"error: {failed.part} ({failed.weights}) failed: {failed.error}", file=sys.stderr)
    return PART_FAILED_STATUS if evaluation.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
