"""What a run has recorded, for the page, and what is left of it: curves, samples, stages, ledger. Changes nothing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdm_lightning.app.shelf import inside
from hdm_lightning.data.decode import load_upright
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.errors import UserError
from hdm_lightning.json_files import parse_object
from hdm_lightning.printable import in_one_line
from hdm_lightning.profiling.encoder_costs import EncoderConfigs
from hdm_lightning.training.callbacks.keep_ledger import Ledger
from hdm_lightning.training.callbacks.progress_bar import duration
from hdm_lightning.training.callbacks.throughput import stage_flops
from hdm_lightning.training.recorded import is_training, model_config_from, read_recorded, recorded_settings
from hdm_lightning.training.run_folder import CONFIG, DONE, LEDGER, is_finished
from hdm_lightning.training.stages import AutoencoderStageSettings, StagePlan, plan_stages, plans_of

MOST_POINTS = 400
"""Most points of a curve: more than the plot has pixels would only slow the page down."""
MOST_SAMPLES = 60
MOST_LINES = 200
LARGEST_EVENTS = 2 << 30
"""Bytes of a stage's event files."""
_SAMPLE = re.compile(r"(\d{1,15})(?:-(\d+x\d+))?\.png")
_FIRST = ("train/loss_mean", "train/loss", "val/loss", "val/psnr")
"""Curves that come first in the list."""


class Point(NamedTuple):
    """A value of a curve after a number of samples of the whole run."""

    curve: str
    samples: int
    value: float


@dataclass(frozen=True)
class Curves:
    """All curves that a run has logged, by name, each with its points in the order of samples."""

    points: Mapping[str, Sequence[Point]]

    def usual(self) -> list[str]:
        """Return the names of the losses, or else the first name."""
        names = list(self.points)  # the first of the two training losses is the smoother one
        trained = [name for name in names if name in _FIRST and name.startswith("train/")][:1]
        validated = [name for name in names if name == "val/psnr" or name.startswith("val/loss")]
        return trained + validated or names[:1]

    def of(self, names: Sequence[str]) -> list[Point]:
        """Return the points of some curves; unknown names are skipped."""
        return [point for name in names if name in self.points for point in _thinned(self.points[name])]


@dataclass(frozen=True)
class StageRow:
    """The progress of a stage: `state` is not started, started or ended; `validation` has the losses at its end."""

    plan: StagePlan
    samples: int
    seconds: float
    device_hours: float
    cost_usd: float
    state: str
    validation: Mapping[str, float]


class Run:
    """A run's folder, read on demand.

    Args:
        folder: the run's folder; files outside of it that links lead to are not read.

    Raises:
        UserError: its configuration cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = inside(folder, folder / CONFIG)
        self.of_pipeline = is_training(file)
        self.ledger = Ledger(inside(folder, folder / LEDGER), writes=False)
        if self.of_pipeline:
            self.settings = recorded_settings(file)
            self.plans = plan_stages(self.settings.schedule, 1)
        else:
            self.plans = plans_of({"stage": _vae_stage(file)}, 1)

    @property
    def is_finished(self) -> bool:
        """Whether its result has been exported."""
        return is_finished(self.folder)

    def curves(self) -> Curves:
        """Return all scalars of all stages in TensorBoard's files."""
        found: dict[str, list[Point]] = {}
        for folder in sorted(self.folder.glob("*/tensorboard")):
            for name, points in _scalars(self.folder, folder):
                found.setdefault(name, []).extend(points)
        names = [*(name for name in _FIRST if name in found), *sorted(found)]
        return Curves({name: sorted(found[name], key=lambda point: point.samples) for name in names})

    def samples(self) -> list[tuple[Image.Image, str]]:
        """Return sheets of sample images and their captions, spread evenly over the run and including the last one."""
        files = [
            (file, match) for file in self.folder.glob("*/samples/*.png") if (match := _SAMPLE.fullmatch(file.name))
        ]
        files.sort(key=lambda each: (int(each[1][1]), each[1][2] or ""))
        step = max(1, -(-len(files) // MOST_SAMPLES))
        sheets = []
        for file, match in reversed(files[::-1][::step]):
            try:
                sheet = load_upright(inside(self.folder, file).read_bytes())
            except (OSError, SampleFault, UserError):  # an incomplete file, or one outside this run
                continue
            size = f", {match[2]} px" if match[2] else ""
            sheets.append((sheet, f"{int(match[1]):,} samples{size}"))
        return sheets

    def stages(self) -> list[StageRow]:
        """Return every stage of the schedule, including those not started."""
        events = self.ledger.events()
        return [self._stage(plan, [each for each in events if each.get("stage") == plan.name]) for plan in self.plans]

    def _stage(self, plan: StagePlan, events: Sequence[Mapping[str, Any]]) -> StageRow:
        counted = [each["samples"] for each in events if _is_count(each.get("samples"))]
        seconds, hours, usd = (self.ledger.spent(key, plan.name) for key in ("seconds", "device_hours", "cost_usd"))
        done = _done(self.folder, plan)
        state = "ended" if done else "started" if events else "not started"
        if done and done.get("ended_by") not in (None, "samples"):
            state = f"ended by {in_one_line(done['ended_by'])[:40]}"
        losses = done.get("validation")
        validation = {
            in_one_line(name)[:40]: float(value)
            for name, value in (losses if isinstance(losses, dict) else {}).items()
            if isinstance(value, int | float)
        }
        return StageRow(plan, counted[-1] if counted else 0, seconds, hours, usd, state, validation)

    def ledger_rows(self) -> list[list[str]]:
        """Return the ledger's last lines: time, event, stage, samples, seconds, device-hours, dollars, memory."""
        keys = ("time", "event", "stage", "samples", "seconds", "device_hours", "cost_usd", "peak_memory_gb", "reason")
        return [[_cell(event.get(key)) for key in keys] for event in self.ledger.events()[-MOST_LINES:]]


def _scalars(run: Path, folder: Path) -> list[tuple[str, list[Point]]]:
    try:
        files = [inside(run, file) for file in (folder, *folder.iterdir())]
    except UserError:  # TensorBoard would also read the link that leads out of this run
        return []
    if sum(file.stat().st_size for file in files if file.is_file()) > LARGEST_EVENTS:
        hint = "open it in TensorBoard"
        raise UserError("holds more than two gigabytes of events", where=str(folder), hint=hint)
    sizes = {"scalars": 0, "tensors": 1, "images": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1}
    events = EventAccumulator(str(folder), size_guidance=sizes)
    events.Reload()
    return [
        (in_one_line(tag)[:80], [Point(in_one_line(tag)[:80], each.step, each.value) for each in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    ]


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Return evenly spaced points, including the last one."""
    step = max(1, -(-len(points) // MOST_POINTS))
    return points[::-1][::step][::-1]


def _done(folder: Path, plan: StagePlan) -> Mapping[str, Any]:
    try:
        return parse_object(inside(folder, plan.folder(folder) / DONE).read_bytes())
    except (OSError, ValueError):  # not ended, or damaged
        return {}


def _vae_stage(file: Path) -> AutoencoderStageSettings:
    stage = read_recorded(file).get("stage")
    try:
        known = AutoencoderStageSettings.__dataclass_fields__
        given = {key: value for key, value in dict(stage or {}).items() if key in known}
        return AutoencoderStageSettings(**given)
    except (TypeError, ValueError) as error:
        hint = "choose a run of hdm-train or hdm-train-vae"
        raise UserError("contains no stage", where=str(file), hint=hint) from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 50


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if _is_count(value) else in_one_line(value)[:200]


@dataclass(frozen=True)
class Remainder:
    """What is left of a run.

    Attributes:
        samples, seconds, cost_usd: for all stages that have not ended; seconds of wall-clock time.
        stage_seconds: for the current stage.
        spent_seconds, spent_usd: time and cost so far.
    """

    samples: int
    seconds: float
    cost_usd: float
    stage_seconds: float
    spent_seconds: float
    spent_usd: float

    def text(self) -> str:
        """Return a one-line summary."""
        spent = f"{duration(self.spent_seconds)} spent"
        if self.spent_usd:
            spent += f", ${self.spent_usd:.2f}"
        if not self.samples:
            return f"{spent}, nothing left"
        left = f"{duration(self.stage_seconds)} left in this stage, {duration(self.seconds)} in total"
        return f"{spent}; {left}" + (f", ${self.cost_usd:.2f}" if self.cost_usd else "") + ", at the pace so far"


def remainder(run: Run) -> Remainder | None:
    """Return what is left of a run, at the pace of the last stage that began; None if nothing was counted yet.

    Samples of a later stage are weighted by the network's operations at its resolution, as in the progress of training.
    """
    stages = run.stages()
    spent = sum(stage.seconds for stage in stages), sum(stage.cost_usd for stage in stages)
    left = [(stage, stage.plan.samples - stage.samples) for stage in stages if not stage.state.startswith("ended")]
    left = [(stage, samples) for stage, samples in left if samples > 0]
    if not left or run.is_finished:
        return Remainder(0, 0.0, 0.0, 0.0, *spent) if spent[0] else None
    measured = [stage for stage in stages if stage.samples and stage.seconds]
    if not measured:
        return None
    paced = measured[-1]
    weights, pace = _sample_costs(run, stages), paced.seconds / paced.samples
    seconds = [
        samples * pace * weights[stage.plan.number - 1] / weights[paced.plan.number - 1] for stage, samples in left
    ]
    total, usd_per_second = sum(seconds), paced.cost_usd / paced.seconds
    return Remainder(sum(samples for _, samples in left), total, total * usd_per_second, seconds[0], *spent)


def _sample_costs(run: Run, stages: Sequence[StageRow]) -> list[float]:
    """Return the relative cost of a sample of each stage: operations, or pixels if the encoders are not known."""
    plans = [stage.plan for stage in stages]
    if run.of_pipeline:
        try:
            names = run.settings.text_encoder.name, run.settings.vae.name
            factor = EncoderConfigs.of(*names).architectures()[1].factor
            config = model_config_from(run.settings.model)
            return [float(stage_flops(config, plan.settings, factor)) for plan in plans]
        except (UserError, ValueError, OSError):  # an encoder that has moved
            pass
    return [float(plan.settings.resolution**2) for plan in plans]
