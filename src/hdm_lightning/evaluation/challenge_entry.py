"""Entries of the challenge: a folder of images and a cost, scored alike for every model, and checked against the rules.

An entry keeps the outcomes of each image, so anyone who has only the leaderboard can score it again.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.decode import load_upright
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.challenge_cost import Cost, CountedRun
from hdm_lightning.evaluation.challenge_tasks import SEED, TASKS, VERSION, Task
from hdm_lightning.generation.image_files import read_record
from hdm_lightning.metrics.bootstrap import Bootstrap
from hdm_lightning.metrics.prompt_following import CRITERIA, Seen, grade, grade_images
from hdm_lightning.version import __version__

FORMAT = "hdm-lightning challenge 1"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
HEADLINE, HEADLINE_PARTS = "everything", ("unseen one", "unseen two")
"""What ranks entries: the share of images of unseen combinations in which everything is right."""
_BOOTSTRAP = Bootstrap()
_NOTHING = Seen((), {}, None)

Pixels = NDArray[np.uint8]
Outcomes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Maker:
    """Who made an entry, and what it is based on.

    Attributes:
        by: who entered it.
        commit: of the code that trained it, or its address.
        pretrained: networks that were not trained for the task.
        weights: SHA-256 of the weights, if the run is available.
        settings: of the run, if it is available.
    """

    by: str
    commit: str
    pretrained: Sequence[str] = ()
    weights: Mapping[str, str] | None = None
    settings: Mapping[str, Any] | None = None


def numbered_images(folder: Path, task: Task) -> list[Path]:
    """Return the images of a folder by the number that begins each name: `0000.png`, `0001-a-large-red-circle-0.png`.

    Raises:
        UserError: one is missing, or two have the same number.
    """
    if not folder.is_dir():
        raise UserError("is not a folder", where=str(folder), hint="pass the folder of the images")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        begins = re.match(r"(\d{4,})(?=\D)", path.name)
        if begins is None or path.suffix.lower() not in ENDINGS:
            continue
        if int(begins[1]) in found:
            what = f"{path.name} and {found[int(begins[1])].name} have the same number"
            raise UserError(what, where=str(folder), hint="generate into an empty folder")
        found[int(begins[1])] = path
    count = len(task.captions())
    missing = [number for number in range(count) if number not in found]
    if missing or len(found) != count:
        what = f"has {len(found)} numbered images of {count}" + (f"; {missing[0]:04d} is missing" if missing else "")
        hint = f"name them 0000.png, 0001.png, … like the prompts of `hdm-challenge prompts {task.name}`, one for each"
        raise UserError(what, where=str(folder), hint=hint)
    return [found[number] for number in range(count)]


def read_images(paths: Sequence[Path], task: Task) -> list[Pixels]:
    """Read the images, uint8 (H,W,3). Raises UserError: one has another size or cannot be read."""
    side, images = task.options.resolution, []
    for path in paths:
        try:
            image = np.asarray(load_upright(path.read_bytes()))
        except Exception as error:  # a damaged file can make Pillow raise anything
            raise UserError(f"cannot be read ({error})", where=str(path), hint="write it again") from error
        if image.shape != (side, side, 3):
            what = f"is {image.shape[1]}x{image.shape[0]} px, expected {side}x{side}"
            raise UserError(what, where=str(path), hint=f"generate all at {side}x{side} px")
        images.append(image)
    return images


def require_by_the_rules(paths: Sequence[Path], task: Task, run: CountedRun) -> None:
    """Check what `hdm-sample` wrote into the images: the run's weights, the task's prompts and seed, equal settings.

    Raises:
        UserError: an image was generated differently.
    """
    hint = f"run hdm-sample RUN --prompts PROMPTS --seed {SEED} --out FOLDER"
    first = read_record(paths[0]).settings
    for path, caption in zip(paths, task.captions(), strict=True):
        record = read_record(path)
        wrong = [
            name
            for name, differs in (
                ("prompt", record.prompt != caption),
                ("seed", record.seed != SEED),
                ("weights", record.fingerprint not in run.weights.values()),
                ("settings", record.settings != first),
                ("start image or LoRA", bool(record.image or record.loras)),
                ("encoders", bool({"text_encoder", "vae"} & set(record.loaded_with))),
            )
            if differs
        ]
        if wrong:
            raise UserError(f"was not generated by the rules: other {', '.join(wrong)}", where=str(path), hint=hint)


def make_entry(name: str, task: Task, images: Sequence[Pixels], cost: Cost, maker: Maker) -> dict[str, Any]:
    """Make an entry from all images in the order of the prompts."""
    outcomes, begin = {}, 0
    for part, prompts in task.asked().items():
        mine = images[begin : begin + len(prompts)]
        outcomes[part] = grade_images([prompt.spec for prompt in prompts], mine).to_json()
        begin += len(prompts)
    return {
        "format": FORMAT,
        "task": task.name,
        "version": VERSION,
        "name": name,
        "scores": scores(outcomes),
        "cost": asdict(cost),
        "maker": {**asdict(maker), "pretrained": list(maker.pretrained)},
        "scored_by": __version__,
        "images_sha256": digest(images),
        "outcomes": outcomes,
    }


def digest(images: Sequence[Pixels]) -> str:
    """Return the SHA-256 of all pixels."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(image).tobytes() for image in images)).hexdigest()


def scores(outcomes: Outcomes) -> dict[str, Any]:
    """Return shares with 95% intervals over combinations of color and shape, for every part and the headline."""
    found: dict[str, Any] = {"headline": _share(outcomes, HEADLINE_PARTS, HEADLINE)}
    for part, graded in outcomes.items():
        found[part] = {criterion: _share(outcomes, (part,), criterion) for criterion in graded["right"]}
    return found


def _share(outcomes: Outcomes, parts: Sequence[str], criterion: str) -> dict[str, float]:
    right = [value for part in parts for value in outcomes[part]["right"][criterion]]
    trials = [value for part in parts for value in outcomes[part]["trials"][criterion]]
    units = [tuple(names) for part in parts for names in outcomes[part]["units"]]
    estimate = _BOOTSTRAP.clustered_share(right, trials, units)
    return {name: round(float(getattr(estimate, name)), 6) for name in ("value", "low", "high")}


def refusals(entry: Mapping[str, Any]) -> list[str]:
    """Return why an entry does not count; empty if it follows the rules, as far as the entry itself shows."""
    reasons: list[str] = []
    for check in _CHECKS:  # each relies on the previous ones
        try:
            reasons += check(entry)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            return [*reasons, f"is not a complete entry ({type(error).__name__}: {error})"]
    return reasons


def judged(entries: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Return every entry of a leaderboard with its refusals; also of names and images that an earlier entry has."""
    found, names, images = [], set[tuple[str, str]](), dict[tuple[str, str], str]()
    for entry in entries:
        reasons = refusals(entry)
        if not reasons:
            name, drawn = (entry["task"], entry["name"]), (entry["task"], entry["images_sha256"])
            if name in names:
                reasons = ["has the name of an earlier entry"]
            elif drawn in images:
                reasons = [f"has the images of {images[drawn]!r}"]
            names.add(name)
            images.setdefault(drawn, entry["name"])
        found.append((entry, reasons))
    return found


def _of_this_version(entry: Mapping[str, Any]) -> list[str]:
    if entry["format"] != FORMAT or entry["task"] not in TASKS or entry["version"] != VERSION:
        raise ValueError(f"{entry['format']!r}, task {entry['task']!r}, version {entry['version']!r}")
    if not _is_text(entry["images_sha256"]):
        raise ValueError("no checksum of its images")
    return [] if _is_text(entry["name"]) else ["has no name"]


def _of_these_prompts(entry: Mapping[str, Any]) -> list[str]:
    """Check that units and trials are those of the task's prompts, and no more is right than was asked."""
    wrong, task = [], TASKS[entry["task"]]
    asked = task.asked()
    if set(entry["outcomes"]) != set(asked):
        return ["does not have the parts of the task"]
    for part, prompts in asked.items():
        graded = entry["outcomes"][part]
        units = [[f"{thing['colour']} {thing['shape']}" for thing in prompt.spec["objects"]] for prompt in prompts]
        if [list(each) for each in graded["units"]] != units:
            wrong.append(f"{part}: is not from the task's prompts")
            continue
        blank = np.array([grade(prompt.spec, _NOTHING)[:, 1] for prompt in prompts])
        asked_for = np.asarray(blank.any(axis=0))
        names, expected = [name for name, each in zip(CRITERIA, asked_for, strict=True) if each], blank[:, asked_for].T
        right, trials = (np.array([graded[kind][name] for name in names]) for kind in ("right", "trials"))
        if trials.shape != expected.shape or (trials != expected).any() or (right < 0).any() or (right > trials).any():
            wrong.append(f"{part}: its counts are impossible")
    return wrong


def _scored_right(entry: Mapping[str, Any]) -> list[str]:
    return (
        [] if entry["scores"] == scores(entry["outcomes"]) else ["its scores do not follow from its images' outcomes"]
    )


def _within_budget(entry: Mapping[str, Any]) -> list[str]:
    task, cost = TASKS[entry["task"]], Cost(**entry["cost"])
    if cost.told_by not in ("run", "entrant") or not _is_text(cost.hardware) or not _is_amount(cost.hours):
        return ["does not name its hardware, its hours and who counted"]
    if cost.usd is not None and not _is_amount(cost.usd):
        return [f"has a rent of {cost.usd!r}"]
    if cost.operations is None:
        if cost.usd is None:
            return ["states neither operations nor dollars"]
        return [] if cost.usd <= task.usd else [f"cost ${cost.usd:g}, more than ${task.usd:g}"]
    if not _is_amount(cost.operations):
        return ["states no valid number of operations"]
    over = cost.operations > task.operations
    return [f"took {cost.operations:.3g} operations, more than {task.operations:.3g}"] if over else []


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _says_who(entry: Mapping[str, Any]) -> list[str]:
    maker, wrong = Maker(**entry["maker"]), []
    if not _is_text(maker.by) or not _is_text(maker.commit):
        wrong.append("does not say who made it, and from which code")
    if entry["cost"]["told_by"] == "run" and not (maker.weights and maker.settings):
        wrong.append("claims to be counted from a run, without the run's weights and settings")
    return wrong


_CHECKS: tuple[Callable[[Mapping[str, Any]], list[str]], ...] = (
    _of_this_version,
    _of_these_prompts,
    _scored_right,
    _within_budget,
    _says_who,
)


def differs_from_images(entry: Mapping[str, Any], images: Sequence[Pixels]) -> list[str]:
    """Return why an entry does not match these images; empty if it does."""
    if entry["images_sha256"] != digest(images):
        return ["was made from other images"]
    again = make_entry(entry["name"], TASKS[entry["task"]], images, Cost(**entry["cost"]), Maker(**entry["maker"]))
    return [] if again["outcomes"] == entry["outcomes"] else ["its images are graded differently"]
