"""An evaluation as one static HTML file: tables, charts and pictures inside it, nothing to be loaded from elsewhere."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from hdm_lightning.evaluation.report_chart import chart
from hdm_lightning.evaluation.report_style import STYLE
from hdm_lightning.evaluation.report_table import ARROWS, measure_names, measure_of
from hdm_lightning.evaluation.results import Curve, Evaluation, Gallery, Measure, PartResult, Picture, rounded

LARGEST_SIDE_PX = 320
PIXELATED_BELOW_PX = 128

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>{facts}</header>
<main>{sections}</main>
<footer>{notes}</footer>
</body>
</html>
"""

_INTERVALS = """<h2>How to read the numbers</h2>
<p>Each number is followed by an interval that holds the true value in {confidence:.0%} of such evaluations, from
resampling the samples with replacement. For averages it is the percentile bootstrap. For distances between sets and for
neighbour statistics it is centred on the value, because resampling shifts these: it says how far the number would move
with other samples of the same counts, and does not remove the bias that a Fréchet distance has at small counts. Compare
Fréchet distances only at equal counts and networks; kernel distances have no such bias. Where a share is
0 or 1 in every resample, the open end is the exact bound of a proportion (Clopper and Pearson).</p>"""


def report_page(evaluation: Evaluation) -> str:
    """The whole page."""
    sections = [_section(evaluation, part, title) for part, title in evaluation.parts()]
    failed = [(f"{one.part} ({one.weights})", one.error, "") for one in evaluation.failed]
    left_out = [(one.part, one.why, one.hint) for one in evaluation.left_out]
    sections += [_without_result("Failed", failed), _without_result("Left out", left_out)]
    confidence = evaluation.settings.get("bootstrap", {}).get("confidence", 0.95)
    pinned = json.dumps(dict(evaluation.settings), indent=2, ensure_ascii=False)
    settings = f"<details><summary>All settings</summary><pre>{escape(pinned)}</pre></details>"
    return _PAGE.format(
        title=escape(f"Evaluation of {evaluation.subject.get('name', 'a model')}"),
        style=STYLE,
        facts=_facts(evaluation.subject),
        sections="".join(sections),
        notes=_INTERVALS.format(confidence=confidence) + settings,
    )


def _without_result(heading: str, parts: Sequence[tuple[str, str, str]]) -> str:
    """A section with the name, the reason and the advice of each part; nothing where there is none."""
    rows = "".join(
        f"<li><b>{escape(name)}</b>: {escape(why)} <i>{escape(advice)}</i></li>" for name, why, advice in parts
    )
    return f"<section><h2>{heading}</h2><ul>{rows}</ul></section>" if rows else ""


def _facts(subject: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(key).replace('_', ' '))}</th><td>{escape(_plain(value))}</td></tr>"
        for key, value in subject.items()
    )
    return f'<table class="facts">{rows}</table>'


def _section(evaluation: Evaluation, part: str, title: str) -> str:
    found = {weights: evaluation.of(weights, part) for weights in evaluation.results}
    present = {weights: result for weights, result in found.items() if result is not None}
    body = [_measures(evaluation, part, list(present)), *_charts(present)]
    for weights, result in present.items():
        body += [_gallery(gallery, weights if len(evaluation.results) > 1 else "") for gallery in result.galleries]
    record = next(iter(present.values())).record
    facts = "; ".join(f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in record.items())
    pinned = f'<p class="pinned">{escape(facts)}</p>' if facts else ""
    return f'<section id="{escape(part)}"><h2>{escape(title)}</h2>{"".join(body)}{pinned}</section>'


def _measures(evaluation: Evaluation, part: str, weights: Sequence[str]) -> str:
    names = measure_names(evaluation, part)
    if not names:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in weights)
    rows = []
    for name in names:
        found = [measure_of(evaluation, each, part, name) for each in weights]
        known = next(one for one in found if one)
        cells = "".join(f"<td>{_cell(one)}</td>" for one in found)
        about = f'<div class="about">{escape(known.about)}</div>' if known.about else ""
        rows.append(
            f"<tr><th>{escape(name.replace('_', ' '))} <span>{ARROWS[known.better]}</span>{about}</th>{cells}"
            f"<td>{known.estimate.samples}</td></tr>"
        )
    return (
        f'<div class="scroll"><table class="measures"><thead><tr><th>measure</th>{head}<th>samples</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(measure: Measure | None) -> str:
    if measure is None:
        return "–"
    value, interval = rounded(measure.estimate)
    chance = "" if measure.chance is None else f"<small>chance {measure.chance:.3g}</small>"
    unit = f" {escape(measure.unit)}" if measure.unit else ""
    return f"<b>{value}</b>{unit}<small>{interval}</small>{chance}"


def _charts(present: Mapping[str, PartResult]) -> list[str]:
    titles = dict.fromkeys(curve.title for result in present.values() for curve in result.curves)
    drawn = []
    for title in titles:
        curves: dict[str, Curve] = {
            weights: curve for weights, result in present.items() for curve in result.curves if curve.title == title
        }
        legend = "".join(f'<span class="series-{k}">{escape(name)}</span>' for k, name in enumerate(curves))
        drawn.append(
            f'<figure class="chart"><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
            f"{chart(curves)}</figure>"
        )
    return drawn


def _gallery(gallery: Gallery, weights: str) -> str:
    columns = f' style="grid-template-columns: repeat({gallery.columns}, max-content)"' if gallery.columns else ""
    figures = "".join(
        f"<figure>{_image(picture, caption)}<figcaption>{escape(caption)}</figcaption></figure>"
        for picture, caption in zip(gallery.pictures, gallery.captions, strict=True)
    )
    title = f"{gallery.title} ({weights})" if weights else gallery.title
    return f'<h3>{escape(title)}</h3><div class="scroll"><div class="gallery"{columns}>{figures}</div></div>'


def _image(picture: Picture, caption: str) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST_SIDE_PX, LARGEST_SIDE_PX))
    small = max(image.size) <= PIXELATED_BELOW_PX
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    factor = max(1, PIXELATED_BELOW_PX // max(image.size)) if small else 1
    size = f'width="{image.width * factor}" height="{image.height * factor}"'
    style = ' class="pixels"' if factor > 1 else ""
    kind = "png" if small else "jpeg"
    return f'<img src="data:image/{kind};base64,{data}" {size}{style} alt="{escape(caption)}">'


def _plain(value: Any) -> str:
    """A value for people: numbers to four digits, lists without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
