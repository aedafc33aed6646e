"""Where an evaluation goes: JSON, a static HTML report, TensorBoard."""

from pathlib import Path

import numpy as np
from PIL import Image

from hdm_lightning.evaluation.report_html import report_page
from hdm_lightning.evaluation.results import Evaluation, Gallery
from hdm_lightning.generation.contact_sheet import contact_sheet
from hdm_lightning.whole_files import write_json, write_text

RESULT_FILE = "evaluation.json"
PARTIAL_FILE = "evaluation.partial.json"
REPORT_FILE = "report.html"
TENSORBOARD_FOLDER = "tensorboard"


def keep_partial(evaluation: Evaluation, folder: Path) -> None:
    """Write the numbers found so far; `write_outputs` replaces them by the whole."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(evaluation, folder / PARTIAL_FILE)


def write_outputs(evaluation: Evaluation, folder: Path, samples_seen: int = 0) -> list[Path]:
    """Write all outputs; returns the files and folders for people to look at.

    Args:
        evaluation: what was found.
        folder: made if missing; files of the same names are replaced.
        samples_seen: where on TensorBoard's axis the values stand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(evaluation, folder / RESULT_FILE)
    (folder / PARTIAL_FILE).unlink(missing_ok=True)
    write_text(folder / REPORT_FILE, report_page(evaluation))
    write_tensorboard(evaluation, folder / TENSORBOARD_FOLDER, samples_seen)
    return [folder / RESULT_FILE, folder / REPORT_FILE, folder / TENSORBOARD_FOLDER]


def _write_json(evaluation: Evaluation, path: Path) -> None:
    write_json(path, evaluation.to_json())


def write_tensorboard(evaluation: Evaluation, folder: Path, step: int) -> None:
    """Write every measure with its interval as scalars, the galleries as images, each set of weights a run."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (seconds to import)

    for weights, parts in evaluation.results.items():
        with SummaryWriter(str(folder / weights)) as writer:
            margins = {}
            for part in parts:
                for measure in part.measures:
                    tag, estimate = f"{part.part}/{measure.name}", measure.estimate
                    ends = {tag: estimate.value, f"{tag}/low": estimate.low, f"{tag}/high": estimate.high}
                    for name, value in ends.items():
                        writer.add_scalar(name, value, step)
                    margins[tag] = ["Margin", list(ends)]
                for number, gallery in enumerate(part.galleries):
                    sheet = np.asarray(_sheet(gallery))
                    writer.add_image(f"{part.part}/pictures_{number}", sheet, step, dataformats="HWC")
            writer.add_custom_scalars({"with intervals": margins})


def _sheet(gallery: Gallery) -> Image.Image:
    pictures = [Image.fromarray(picture) for picture in gallery.pictures]
    return contact_sheet(pictures, gallery.captions, columns=gallery.columns or None, title=gallery.title)
