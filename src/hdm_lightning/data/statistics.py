"""What a set of shards holds, in numbers (samples, sizes, shapes, captions) and as histograms."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.plan import Plan
from hdm_lightning.data.reader import Reader
from hdm_lightning.data.rules import StreamConfig
from hdm_lightning.data.sources import Source, resolve
from hdm_lightning.errors import UserError
from hdm_lightning.printable import in_one_line

SIDES_PX = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
ASPECTS = (0.25, 1 / 3, 0.5, 2 / 3, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Statistics:
    """Numbers of a set.

    Attributes:
        shards, samples, bytes: of all shards; samples that can be used.
        left_out: samples that cannot, by reason.
        height, width: pixels of each upright image, int64 (samples,).
        caption_lengths: of the captions that were read, in `caption_unit`, int64 (n,).
        caption_unit: words or tokens.
        bad_captions: samples among those read that have no caption.
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
    """Numbers of the shards at some addresses.

    Args:
        urls: folders, shards or brace patterns.
        captions: how captions are found; None for the defaults.
        caption_samples: how many captions are read, at random.
        length_of: length of a caption in `caption_unit`; None counts words.

    Raises:
        UserError: an index is missing, or there is nothing to count.
    """
    source = Source(tuple(urls))
    records = [record for _, record in resolve(source)]
    heights, widths = zip(*(record.shapes() for record in records), strict=True)
    lengths, bad = _caption_lengths(source, captions or CaptionRules(), caption_samples, length_of or _words)
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
    )


def _words(text: str) -> int:
    return len(text.split())


def _caption_lengths(
    source: Source, captions: CaptionRules, samples: int, length_of: Callable[[str], int]
) -> tuple[NDArray[np.int64], int]:
    config = StreamConfig((source,), 1, 1, stage="statistics", crop=CropRules(max_aspect=np.inf))
    plan = Plan(config)
    reader, lengths, bad = Reader(plan, config), [], 0
    for position in range(min(samples, plan.samples)):
        try:
            lengths.append(length_of(captions.first(reader.read(plan.locate(position)).members)))
        except SampleFault:
            bad += 1
    return np.asarray(lengths, dtype=np.int64), bad


def as_table(found: Statistics) -> str:
    """The numbers as lines of text."""
    lines = [
        f"shards     {found.shards}",
        f"samples    {found.samples}",
        f"size       {found.bytes / 1e9:.2f} GB, {found.bytes / max(found.samples, 1) / 1e3:.1f} kB a sample",
    ]
    lines += [f"left out   {count} × {in_one_line(reason)}" for reason, count in found.left_out.most_common()]
    lines += ["", "short side in pixels", *_bars(found.short_side, SIDES_PX, "{:g}")]
    lines += ["", "width / height", *_bars(found.aspect, ASPECTS, "{:.2f}")]
    lines += ["", f"captions ({len(found.caption_lengths)} read, {found.bad_captions} missing or unreadable)"]
    if len(found.caption_lengths):
        marks = np.percentile(found.caption_lengths, (5, 50, 95, 99, 100))
        names = ("5%", "50%", "95%", "99%", "longest")
        marked = ", ".join(f"{name} {mark:.0f}" for name, mark in zip(names, marks, strict=True))
        lines.append(f"  {found.caption_unit}: {marked}")
    return "\n".join(lines)


def _bars(values: NDArray[np.int64] | NDArray[np.float64], edges: Sequence[float], form: str) -> list[str]:
    """A histogram as lines; the last class is open above, and so is the first below."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    names = [f"below {form.format(edges[0])}"] + [f"from {form.format(edge)}" for edge in edges]
    share = counts / max(1, len(values))
    return [
        f"  {name:12} {count:10d} {part:6.1%} {'#' * round(40 * part)}"
        for name, count, part in zip(names, counts.tolist(), share.tolist(), strict=True)
        if count
    ]


def draw(found: Statistics, path: str | Path) -> None:
    """Histograms of short sides, aspect ratios and caption lengths, written as an image file.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (optional)
    except ImportError as error:
        hint = "pip install 'hdm-lightning[plots]', or leave --picture out"
        raise UserError("histograms need matplotlib", where="--picture", hint=hint) from error
    figure = Figure(figsize=(12, 3.6), layout="constrained")
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
