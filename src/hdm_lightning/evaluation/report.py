"""An evaluation as a self-contained static HTML page, as a table, as JSON and for TensorBoard."""

import base64
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image
from rich.markup import escape
from rich.table import Table

from hdm_lightning.evaluation.findings import Curve, Evaluation, Found, Gallery, Group, rounded
from hdm_lightning.generation.contact_sheet import contact_sheet
from hdm_lightning.printable import in_one_line
from hdm_lightning.whole_files import write_json, write_text

RESULT_FILE = "evaluation.json"
PARTIAL_FILE = "evaluation.partial.json"
REPORT_FILE = "report.html"
TENSORBOARD_FOLDER = "tensorboard"

ENLARGED_BELOW_PX = 128
_ARROWS = {"lower": "↓", "higher": "↑", "one": "→ 1", "zero": "→ 0", "none": ""}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 260, 62, 544, 14, 214
_TICKS = 5
_TEMPLATES = Environment(loader=PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def report_page(evaluation: Evaluation) -> str:
    """Return the HTML page."""
    return _TEMPLATES.get_template("report.html").render(
        title=f"Evaluation of {evaluation.subject.get('name', 'a model')}",
        facts=_facts(evaluation),
        evaluation=evaluation,
        confidence=evaluation.settings.get("bootstrap", {}).get("confidence", 0.95),
        settings=json.dumps(dict(evaluation.settings), indent=2, ensure_ascii=False),
        arrows=_ARROWS,
        rounded=rounded,
        plain=_plain,
        charts=_charts,
        chart=chart,
        embedded=_embedded,
    )


def headline(evaluation: Evaluation, weights: str) -> dict[str, dict[str, float]]:
    """Return the primary measures: `part.measure` → value, and low and high of its interval."""
    found = {}
    for part, result in evaluation.results.get(weights, {}).items():
        for measure in result.measures:
            name = f"{part}.{measure.name}"
            if name in evaluation.settings.get("primary", ()) and math.isfinite(measure.estimate.value):
                interval = {key: getattr(measure.estimate, key) for key in ("low", "high")}
                numbers = {key: value for key, value in interval.items() if value is not None and math.isfinite(value)}
                found[name] = {"value": measure.estimate.value, **(numbers if len(numbers) == 2 else {})}
    return found


def result_table(evaluation: Evaluation) -> Table:
    """Return a table with a row per measure: value and interval for each set of weights."""
    table = Table(title=None, header_style="bold")
    table.add_column("measure", overflow="fold")  # a narrow terminal folds names, never numbers
    table.add_column("", no_wrap=True)
    for name in evaluation.results:
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("interval", justify="right", style="dim", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    for part, title in evaluation.parts().items():
        table.add_section()
        table.add_row(f"[bold]{escape(in_one_line(title))}[/bold]")
        for row in evaluation.measures(part):
            cells = [rounded(row[name].estimate) if name in row else ("", "") for name in evaluation.results]
            known = next(iter(row.values()))
            numbers = (text for cell in cells for text in cell)
            table.add_row(
                escape(in_one_line(f"  {known.name}")), _ARROWS[known.better], *numbers, str(known.estimate.samples)
            )
    return table


def chart(curves: Mapping[str, Curve]) -> Markup:
    """Return the same curve of several weights as inline SVG that takes its colors from the page.

    Args:
        curves: curve by name of the weights; class `series-K` gives the K-th its color.
    """
    first = next(iter(curves.values()))
    estimates = [estimate for curve in curves.values() for estimate in curve.estimates]
    bottom, top = _room(min(one.low for one in estimates), max(one.high for one in estimates))
    start, end = _room(min(first.x), max(first.x))
    drawing = _TEMPLATES.get_template("chart.svg").render(
        curve=first,
        series={name: list(zip(curve.x, curve.estimates, strict=True)) for name, curve in curves.items()},
        ticks=_ticks(bottom, top),
        across=lambda x: _LEFT + (x - start) / (end - start) * (_RIGHT - _LEFT),
        down=lambda y: _BOTTOM - (y - bottom) / (top - bottom) * (_BOTTOM - _TOP),
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_RIGHT,
        bottom=_BOTTOM,
    )
    return Markup(drawing)


def _charts(by_weights: Mapping[str, Found]) -> dict[str, dict[str, Curve]]:
    """Return the curves by title and by weights."""
    titles = dict.fromkeys(curve.title for found in by_weights.values() for curve in found.curves)
    pairs = [(weights, curve) for weights, found in by_weights.items() for curve in found.curves]
    return {title: {weights: curve for weights, curve in pairs if curve.title == title} for title in titles}


def _ticks(bottom: float, top: float) -> list[float]:
    """Return round numbers within the range, 1, 2 or 5 times a power of ten apart, about `_TICKS` of them."""
    rough = (top - bottom) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(bottom / step), math.floor(top / step) + 1)]


def _room(low: float, high: float) -> tuple[float, float]:
    """Return the range with a small margin on both sides."""
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - margin, high + margin


class _Embedded(NamedTuple):
    """An image as embedded in the page."""

    label: str
    source: str
    width: int
    height: int
    enlarged: bool


def _embedded(group: Group, largest_px: int) -> list[_Embedded]:
    """Return a group's images as data URLs at one scale: reduced to `largest_px`, or enlarged by a whole factor."""
    longest = max(max(array.shape[:2]) for array in group.images.values())
    scale, factor = min(1.0, largest_px / longest), max(1, ENLARGED_BELOW_PX // longest)
    kind = "png" if longest <= ENLARGED_BELOW_PX else "jpeg"
    found = []
    for label, array in group.images.items():
        image = Image.fromarray(array)
        if scale < 1:
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        buffer = io.BytesIO()
        image.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 88}))
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        size = image.width * factor, image.height * factor
        found.append(_Embedded(label, f"data:image/{kind};base64,{data}", *size, factor > 1))
    return found


def _facts(evaluation: Evaluation) -> dict[str, str]:
    """Return the facts at the top of the page: the model, its sampling settings, data, date and command."""
    settings, facts = evaluation.settings, dict(evaluation.subject)
    if "sampling" in settings:
        one = settings["sampling"]
        facts["drawn with"] = (
            f"{one['width']}×{one['height']} px, {one['steps']} steps of {one['solver']}, time shift {one['shift']:g}, "
            f"guidance {one['guidance_scale']:g}, {settings.get('precision', 'float32')}"
            + (f", away from “{one['negative_prompt']}”" if one["negative_prompt"] else "")
        )
    facts |= {key: settings[key] for key in ("samples", "seed") if key in settings}
    data = settings.get("data", {})
    for name, each in ({"real": data} if "sources" in data else data).items():  # an autoencoder has one data set
        facts[f"{name} images"] = f"{_plain(each['sources'])}, {each['resolution']} px"
    facts |= {
        "date": f"{evaluation.date.replace('T', ' ')}, took {evaluation.seconds:.0f} s",
        "command": evaluation.command,
    }
    return {str(key).replace("_", " "): _plain(value) for key, value in facts.items() if value not in (None, "")}


def _plain(value: Any) -> str:
    """Format a value for display: numbers with four digits, lists without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def keep_partial(evaluation: Evaluation, folder: Path) -> None:
    """Write the numbers found so far; `write_outputs` replaces them by the final ones."""
    write_json(folder / PARTIAL_FILE, evaluation.to_json())


def write_outputs(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write all outputs; return the files and folders to look at."""
    write_json(folder / RESULT_FILE, evaluation.to_json())
    (folder / PARTIAL_FILE).unlink(missing_ok=True)
    write_text(folder / REPORT_FILE, report_page(evaluation))
    write_tensorboard(evaluation, folder / TENSORBOARD_FOLDER)
    return [folder / RESULT_FILE, folder / REPORT_FILE, folder / TENSORBOARD_FOLDER]


def write_tensorboard(evaluation: Evaluation, folder: Path) -> None:
    """Write every measure with its interval as scalars and the galleries as images; each set of weights is a run.

    The step is the number of training samples behind the weights, 0 if unknown. All tags begin with `evaluation/`, so
    no chart of a training picks them up.
    """
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (seconds to import)

    seen = evaluation.subject.get("samples_seen")  # from the model's folder, which may hold anything
    step = seen if isinstance(seen, int) else 0
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
    """Return all images of a gallery on one sheet, a row per group if it has several."""
    cells = [(label, group, array) for group in gallery.groups for label, array in group.images.items()]
    columns = max(len(group.images) for group in gallery.groups)
    captions = [group.caption if columns == 1 else f"{label}: {group.caption}" for label, group, _ in cells]
    arrays = [Image.fromarray(array) for _, _, array in cells]
    return contact_sheet(arrays, captions, columns=None if columns == 1 else columns, title=gallery.title)
