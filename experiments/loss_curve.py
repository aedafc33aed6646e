"""Plot the loss curves of a run from its TensorBoard files: `python experiments/loss_curve.py RUN PICTURE`."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {"train/loss_mean": "training", "val/loss": "validation, raw weights"}
AVERAGED = "val/loss_ema"


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (samples seen, loss) of one stage by name of the curve."""
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        name = "validation, averaged weights" if tag.startswith(AVERAGED) else TAGS.get(tag)
        if name:
            found[name] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def main() -> None:
    """Plot all stages on one axis of samples seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    figure, axis = plt.subplots(figsize=(8, 3.6))
    colours = {
        "training": "lightgray",
        "validation, raw weights": "tab:orange",
        "validation, averaged weights": "tab:blue",
    }
    for folder in sorted(arguments.run.glob("*/tensorboard")):
        for name, points in curves(folder).items():
            marker = "" if name == "training" else "."
            axis.plot(*zip(*points, strict=True), marker=marker, color=colours[name], label=name)
        start = min(point[0] for points in curves(folder).values() for point in points)
        axis.annotate(folder.parent.name, (start, 1), xycoords=("data", "axes fraction"), va="bottom", fontsize=8)
        axis.axvline(start, color="lightgray", linewidth=0.5)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles.keys())
    axis.set(xlabel="samples seen", ylabel="flow-matching loss", yscale="log")
    figure.tight_layout()
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
