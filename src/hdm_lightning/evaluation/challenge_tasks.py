"""The three tasks of `hdm-challenge`: fixed data from fixed seeds, fixed prompts, a fixed budget.

Everything that entries depend on is here; if it changes, `VERSION` changes, and older entries no longer compare.
"""

import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.decode import load_upright
from hdm_lightning.datasets.build import JOURNAL
from hdm_lightning.datasets.shapes import Prompt, ShapesOptions, build_shapes, make_image, scene_prompts
from hdm_lightning.datasets.shapes_scenes import Split
from hdm_lightning.errors import UserError
from hdm_lightning.whole_files import read_lines

VERSION = 1
SAMPLES_PER_SHARD = 1000
SPOT_CHECKED = 8
"""Number of scenes of the first shard that are drawn again and compared."""
SPLITS: tuple[tuple[str, Split, int], ...] = (
    ("unseen one", "heldout", 1),
    ("unseen two", "heldout", 2),
    ("seen one", "train", 1),
    ("seen two", "train", 2),
)
"""Parts of the prompts in order: pairs of color and shape that training never shows, or does; number of objects."""
SEED = 0
"""Seed of every image's noise, so that nobody picks among several."""


@dataclass(frozen=True)
class Task:
    """One size of the challenge.

    Attributes:
        name: on the command line.
        about: how much hardware it needs.
        scenes: of the training set, drawn with `options`.
        prompts: of each of the four parts.
        operations: budget of all trainings together, two per multiply-add, forward and backward (three times forward).
        usd: budget in rent of the machine, instead, if operations cannot be counted.
    """

    name: str
    about: str
    options: ShapesOptions
    scenes: int
    prompts: int
    operations: float
    usd: float

    def asked(self) -> dict[str, list[Prompt]]:
        """Return the prompts of each part."""
        return {name: scene_prompts(self.prompts, split=split, objects=count) for name, split, count in SPLITS}

    def captions(self) -> list[str]:
        """Return all prompts in the order of their images' numbers."""
        return [prompt.caption for part in self.asked().values() for prompt in part]

    def header(self) -> dict[str, object]:
        """Return the first line of the journal of its training set."""
        return {"source": "shapes", **asdict(self.options), "samples_per_shard": SAMPLES_PER_SHARD}

    def build(self, folder: Path) -> Path:
        """Draw the training set; an interrupted build resumes."""
        drawn = {**asdict(self.options), "objects": dict(self.options.objects)}
        return build_shapes(folder, count=self.scenes, samples_per_shard=SAMPLES_PER_SHARD, **drawn)

    def require_data(self, folder: Path) -> None:
        """Check that a folder contains the task's training set: options, counts, and a few scenes drawn again.

        Raises:
            UserError: it contains another one, or is incomplete.
        """
        hint = f"build it: hdm-challenge data {self.name} --out FOLDER"
        lines = read_lines(folder / JOURNAL) if (folder / JOURNAL).is_file() else []
        if not lines or lines[0] != json.loads(json.dumps(self.header())):
            raise UserError(f"is not the training set of the task {self.name}", where=str(folder), hint=hint)
        rows = {str(line.get("shard")): int(line.get("samples", 0)) for line in lines[1:] if not line.get("gone")}
        shards = sorted(path.name for path in folder.glob("*.tar"))
        if sum(rows.values()) != self.scenes or shards != sorted(rows):
            raise UserError(f"does not have exactly the shards of {self.scenes} scenes", where=str(folder), hint=hint)
        for index, image in enumerate(_images(folder / shards[0])):
            if not np.array_equal(image, make_image(self.options, index)[0]):
                raise UserError(f"scene {index} is not the task's", where=str(folder / shards[0]), hint=hint)


def _images(shard: Path) -> Iterator[NDArray[np.uint8]]:
    with tarfile.open(shard) as archive:
        pictures = (member for member in archive if member.name.endswith(".png"))
        for member in itertools.islice(pictures, SPOT_CHECKED):
            content = archive.extractfile(member)
            assert content is not None
            yield np.asarray(load_upright(content.read()))


_ASPECTS = (1.0, 1.5, 0.6667)


def _options(seed: int, resolution: int, objects: dict[int, float], variation: float) -> ShapesOptions:
    weights = tuple(sorted(objects.items()))
    return ShapesOptions(seed, resolution, _ASPECTS, objects=weights, encoding="png", variation=variation)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "small",
            "minutes on a CPU, 64 px",
            _options(1001, 64, {1: 0.75, 2: 0.25}, 0.15),
            scenes=8_000,
            prompts=64,
            operations=3.5e13,
            usd=0.02,
        ),
        Task(
            "medium",
            "an hour on one GPU, 128 px",
            _options(1002, 128, {1: 0.5, 2: 0.5}, 0.5),
            scenes=100_000,
            prompts=128,
            operations=1.9e17,
            usd=0.4,
        ),
        Task(
            "large",
            "a day on one GPU, 256 px",
            _options(1003, 256, {1: 0.34, 2: 0.33, 3: 0.33}, 1.0),
            scenes=1_000_000,
            prompts=256,
            operations=4.5e18,
            usd=9.0,
        ),
    )
}
"""By name. The small budget is the two trainings of `hdm-demo` plus a tenth. The others are what an RTX 5090 does in an
hour and in a day at a quarter of its peak rate, and its rent for that time, rounded up."""


def task_of(name: str) -> Task:
    """Return a task by name. Raises UserError: it does not exist."""
    if name not in TASKS:
        raise UserError(f"{name!r} is not a task", where="TASK", hint=f"choose one of {', '.join(TASKS)}")
    return TASKS[name]
