"""The numbers of a set of shards as a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from hdm_lightning.data.statistics import Statistics
from hdm_lightning.errors import UserError


def draw(found: Statistics, path: str | Path) -> None:
    """Histograms of short sides, aspect ratios and caption lengths, written as an image file.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (optional)
    except ImportError as error:
        hint = "pip install 'hdm-lightning[plots]', or leave --picture out"
        raise UserError("pictures need matplotlib", where="--picture", hint=hint) from error
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
