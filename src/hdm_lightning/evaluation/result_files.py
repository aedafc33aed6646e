"""Where an evaluation goes: JSON, a static HTML report, TensorBoard."""

from pathlib import Path

import numpy as np
from PIL import Image

from hdm_lightning.evaluation.report import report_page
from hdm_lightning.evaluation.results import Evaluation, Gallery
from hdm_lightning.generation.contact_sheet import contact_sheet
from hdm_lightning.whole_files import write_json, write_text

RESULT_FILE = "evaluation.json"
PARTIAL_FILE = "evaluation.partial.json"
REPORT_FILE = "report.html"
TENSORBOARD_FOLDER = "tensorboard"


def keep_partial(evaluation: Evaluation, folder: Path) -> None:
    """Write the numbers found so far; `write_outputs` replaces them by the whole."""
    write_json(folder / PARTIAL_FILE, evaluation.to_json())


def write_outputs(evaluation: Evaluation, folder: Path, samples_seen: int = 0) -> list[Path]:
    """Write all outputs; returns the files and folders for people to look at.

    Args:
        evaluation: what was found.
        folder: made if missing; files of the same names are replaced.
        samples_seen: where on TensorBoard's axis the values stand.
    """
    write_json(folder / RESULT_FILE, evaluation.to_json())
    (folder / PARTIAL_FILE).unlink(missing_ok=True)
    write_text(folder / REPORT_FILE, report_page(evaluation))
    write_tensorboard(evaluation, folder / TENSORBOARD_FOLDER, samples_seen)
    return [folder / RESULT_FILE, folder / REPORT_FILE, folder / TENSORBOARD_FOLDER]


def write_tensorboard(evaluation: Evaluation, folder: Path, step: int) -> None:
    """Write every measure with its interval as scalars, the galleries as images, each set of weights a run.

    All stand under `evaluation/`, so that no chart of a training takes them in.
    """
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (seconds to import)

    for weights, parts in evaluation.results.items():
        with SummaryWriter(str(folder / weights)) as writer:
            margins = {}
            for part, found in parts.items():
                for measure in found.measures:
                    tag, estimate = f"evaluation/{part}/{measure.name}", measure.estimate
                    ends = {tag: estimate.value, f"{tag}/low": estimate.low, f"{tag}/high": estimate.high}
                    for name, value in ends.items():
                        writer.add_scalar(name, value, step)
                    margins[tag] = ["Margin", list(ends)]
                for number, gallery in enumerate(found.galleries):
                    sheet = np.asarray(_sheet(gallery))
                    writer.add_image(f"evaluation/{part}/images_{number}", sheet, step, dataformats="HWC")
            writer.add_custom_scalars({"evaluation, with intervals": margins})


def _sheet(gallery: Gallery) -> Image.Image:
    """All images of a gallery on one sheet, a group a row where it has several."""
    cells = [(label, group, array) for group in gallery.groups for label, array in group.images.items()]
    columns = max(len(group.images) for group in gallery.groups)
    captions = [group.caption if columns == 1 else f"{label}: {group.caption}" for label, group, _ in cells]
    arrays = [Image.fromarray(array) for _, _, array in cells]
    return contact_sheet(arrays, captions, columns=None if columns == 1 else columns, title=gallery.title)
