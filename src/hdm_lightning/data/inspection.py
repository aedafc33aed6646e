"""Inspect a set of shards: statistics (samples, sizes, shapes, captions), histograms, and previews of samples."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.filesize import decimal

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.reader import Reader
from hdm_lightning.data.rules import Source, StreamConfig
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import Preparation, Sample, Tokenize
from hdm_lightning.data.source_shards import resolve
from hdm_lightning.errors import import_optional
from hdm_lightning.printable import in_one_line

SIDES_PX = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
Convention = Literal["area", "long_side"]
MOST_KINDS = 20
"""Maximum number of caption kinds listed in a table."""

IMAGE_PX = 192
MAP_PX = 56
GAP_PX = 4
ASPECTS = (0.25, 1 / 3, 0.5, 2 / 3, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Statistics:
    """Statistics of a set.

    Attributes:
        shards, samples, bytes: totals over all shards; only usable samples are counted.
        left_out: number of unusable samples, by reason.
        height, width: pixels of each upright image, int64 (samples,).
        caption_lengths: lengths of the captions that were read, in `caption_unit`, int64 (n,).
        caption_unit: words or tokens.
        bad_captions: number of samples read that have no caption or are unreadable.
        caption_kinds: lengths of the captions of each kind in the samples read, int64 (n,) each.
    """

    shards: int
    samples: int
    bytes: int
    left_out: Counter[str]
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    caption_lengths: NDArray[np.int64]
    caption_unit: str
    bad_captions: int
    caption_kinds: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def short_side(self) -> NDArray[np.int64]:
        """Short side of each image in pixels."""
        return np.minimum(self.height, self.width)

    @property
    def aspect(self) -> NDArray[np.float64]:
        """Width over height of each image."""
        return self.width / np.maximum(self.height, 1)


def collect(
    urls: Sequence[str],
    *,
    captions: CaptionRules | None = None,
    caption_samples: int = 2000,
    length_of: Callable[[str], int] | None = None,
    caption_unit: str = "words",
) -> Statistics:
    """Collect the statistics of shards.

    Args:
        urls: folders, shards or brace patterns.
        captions: how captions are found; None for the defaults.
        caption_samples: number of random samples whose captions are read.
        length_of: returns the length of a caption in `caption_unit`; None counts words.

    Raises:
        UserError: an index is missing, or there is nothing to count.
    """
    source = Source(tuple(urls))
    records = [record for _, record in resolve(source)]
    count = length_of or (lambda text: len(text.split()))
    lengths, kinds, bad = _caption_lengths(source, captions or CaptionRules(), caption_samples, count)
    heights, widths = zip(*(record.shapes() for record in records), strict=True)
    return Statistics(
        shards=len(records),
        samples=sum(record.samples for record in records),
        bytes=sum(record.bytes for record in records),
        left_out=Counter(reason.partition(":")[0] for record in records for reason in record.skip.values()),
        height=np.concatenate(heights),
        width=np.concatenate(widths),
        caption_lengths=lengths,
        caption_unit=caption_unit,
        bad_captions=bad,
        caption_kinds=kinds,
    )


def _caption_lengths(
    source: Source, captions: CaptionRules, samples: int, length_of: Callable[[str], int]
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]], int]:
    """Return lengths of first captions, lengths of all captions by kind, and the number of samples without any."""
    config = StreamConfig((source,), 1, 1, stage="statistics", crop=CropRules(max_aspect=np.inf))
    plan = Plan(config)
    reader, lengths, bad = Reader(plan, config), [], 0
    kinds: defaultdict[str, list[int]] = defaultdict(list)
    for position in range(min(samples, plan.samples)):
        try:
            members = reader.read(plan.locate(position)).members
            lengths.append(length_of(captions.first(members)))
            every = captions.of_every_place(members)
        except SampleFault:
            bad += 1
            continue
        for caption in every:
            kinds[caption.kind].append(length_of(caption.text))
    found = {kind: np.asarray(kinds[kind], dtype=np.int64) for kind in sorted(kinds)}
    return np.asarray(lengths, dtype=np.int64), found, bad


def trained_caption_lengths(config: StreamConfig, tokenize: Tokenize, count: int) -> list[int]:
    """Return token counts of a stream's first `count` captions, ascending, with the dropout and tags of training.

    Samples that cannot be read are left out.

    Raises:
        UserError: the stream cannot be set up.
    """
    preparation, lengths = Preparation(config, Plan(config), tokenize, training=True), []
    for index in range(min(count, preparation.plan.samples)):
        with suppress(SampleFault):
            lengths.append(preparation.caption_length(index))
    return sorted(lengths)


def as_table(found: Statistics) -> str:
    """Format the statistics as lines of text."""
    lines = [
        f"shards     {found.shards}",
        f"samples    {found.samples}",
        f"size       {decimal(found.bytes)}, {decimal(found.bytes // max(found.samples, 1))} per sample",
    ]
    lines += [f"left out   {count} × {in_one_line(reason)}" for reason, count in found.left_out.most_common()]
    lines += ["", "short side in pixels", *_bars(found.short_side, SIDES_PX, "{:g}")]
    lines += ["", "width / height", *_bars(found.aspect, ASPECTS, "{:.2f}")]
    lines += ["", f"captions ({len(found.caption_lengths)} read, {found.bad_captions} missing or unreadable)"]
    if len(found.caption_lengths):
        marks = np.percentile(found.caption_lengths, (5, 50, 95, 99, 100))
        names = ("5%", "50%", "95%", "99%", "longest")
        marked = ", ".join(f"{name} {mark:.0f}" for name, mark in zip(names, marks, strict=True))
        lines.append(f"  {found.caption_unit} per caption, quantiles: {marked}")
    for kind, lengths in list(found.caption_kinds.items())[:MOST_KINDS]:
        median = f"median {np.median(lengths):.0f} {found.caption_unit}"
        lines.append(f"  kind {in_one_line(kind[:40])}: {len(lengths)} captions, {median}")
    if len(found.caption_kinds) > MOST_KINDS:
        lines.append(f"  and {len(found.caption_kinds) - MOST_KINDS} more kinds")
    return "\n".join(lines)


def _bars(values: NDArray[np.int64] | NDArray[np.float64], edges: Sequence[float], form: str) -> list[str]:
    """Format a histogram as lines; the first and last bins are open-ended."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    names = [f"below {form.format(edges[0])}"] + [f"from {form.format(edge)}" for edge in edges]
    share = counts / max(1, len(values))
    return [
        f"  {name:12} {count:10d} {part:6.1%} {'#' * round(40 * part)}"
        for name, count, part in zip(names, counts.tolist(), share.tolist(), strict=True)
        if count
    ]


def draw(found: Statistics, path: str | Path) -> None:
    """Write histograms of short sides, aspect ratios and caption lengths to an image file.

    Raises:
        UserError: matplotlib is not installed.
    """
    library = import_optional("matplotlib.figure", "plots", where="--picture", instead="leave --picture out")
    figure = library.Figure(figsize=(12, 3.6), layout="constrained")
    sides, shapes, captions = figure.subplots(1, 3)
    _histogram(sides, found.short_side, "short side [pixels]")
    _histogram(shapes, np.log2(np.maximum(found.aspect, 1e-3)), "log₂(width / height)")
    _histogram(captions, found.caption_lengths, f"caption length [{found.caption_unit}]")
    sides.set_ylabel("samples")
    figure.suptitle(f"{found.samples} samples in {found.shards} shards, {found.bytes / 1e9:.2f} GB")
    figure.savefig(path, dpi=120)


def _histogram(axes: Any, values: Any, label: str) -> None:
    if len(values):
        axes.hist(values, bins=40)
    axes.set_xlabel(label)


def preview(sample: Sample, positions: Convention = "area") -> tuple[Image.Image, str]:
    """Return an image of the crop above a small map of its place in the full image, and a line of text.

    The line has the positions of the crop's edges in the network's convention, `positions`.
    """
    canvas = Image.new("RGB", (IMAGE_PX, IMAGE_PX + GAP_PX + MAP_PX), "white")
    crop = Image.fromarray(np.ascontiguousarray(sample.image.transpose(1, 2, 0)))
    scale = IMAGE_PX / max(crop.size)
    canvas.paste(crop.resize((round(crop.width * scale), round(crop.height * scale))), (0, 0))
    _draw_map(ImageDraw.Draw(canvas), sample, 0, IMAGE_PX + GAP_PX)
    top, left, bottom, right = crop_positions(sample, positions)
    place = f"no. {sample.index}: y {top:+.2f} to {bottom:+.2f}, x {left:+.2f} to {right:+.2f}, {sample.length} tokens"
    return canvas, f"{place}: {f'MASKED, {sample.fault}' if sample.fault else sample.caption or '(no caption)'}"


def crop_positions(sample: Sample, convention: Convention = "area") -> tuple[float, float, float, float]:
    """Return top, left, bottom and right edge of a crop as network positions (arXiv 2509.06068, position map).

    With `area`, a full image of H×W pixels spans ±√(H/W) in y and ±√(W/H) in x; with `long_side`, ±1 on its long side.
    """
    top, left, full_height, full_width = sample.crop
    _, height, width = sample.image.shape
    half = sqrt(full_height * full_width) / 2 if convention == "area" else max(full_height, full_width) / 2
    edges = (top - full_height / 2, left - full_width / 2)
    return edges[0] / half, edges[1] / half, (edges[0] + height) / half, (edges[1] + width) / half


def _draw_map(draw: ImageDraw.ImageDraw, sample: Sample, x: int, y: int) -> None:
    top, left, full_height, full_width = sample.crop
    _, height, width = sample.image.shape
    scale = (MAP_PX - 4) / max(full_height, full_width)
    draw.rectangle((x, y, x + full_width * scale, y + full_height * scale), outline="black")
    corner = (x + left * scale, y + top * scale)
    draw.rectangle((*corner, corner[0] + width * scale, corner[1] + height * scale), fill="orange", outline="black")
