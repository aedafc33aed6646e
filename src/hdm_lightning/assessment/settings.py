"""What an evaluation counts, draws and resamples, as plain values that pin its numbers."""

from dataclasses import asdict, dataclass
from typing import Any

from hdm_lightning.errors import UserError
from hdm_lightning.metrics.bootstrap import Bootstrap
from hdm_lightning.metrics.features import DEFAULT_NETWORK

_FEWEST = {
    "samples": 2,
    "train_samples": 1,
    "loss_samples": 2,
    "time_bins": 1,
    "resamples": 2,
    "set_resamples": 2,
    "aspect_prompts": 2,
    "camera_prompts": 2,
    "diversity_prompts": 2,
    "diversity_seeds": 2,
    "shapes_prompts": 1,
    "shapes_pairs": 1,
}


@dataclass(frozen=True)
class EvaluationSettings:
    """Counts, seeds and networks of an evaluation.

    Args:
        seed: picture number i is drawn from seed + i; validation noise, heads and resampling follow from it too.
        samples: pictures drawn for the distances, and real ones that they are compared with.
        train_samples: training pictures searched for copies and used to train the agreement head.
        loss_samples: real pictures whose flow loss is measured, once in every time bin.
        time_bins: equal bins of the time t.
        resamples: of intervals that are cheap to make.
        set_resamples: of the Fréchet distance and the neighbour measures, where each resample costs seconds.
        confidence: share of intervals that hold the true value.
        features: names of feature networks, as for `load_feature_network`.
        clip: hub name or folder of a CLIP, or None.
        ratios: width / height of the pictures drawn beside squares of the same area.
        aspect_prompts, camera_prompts: prompts drawn for these.
        camera_shift: in position units (1 is half a square's side), above 0 and below 1.
        camera_zoom: above 1 is nearer.
        diversity_prompts, diversity_seeds: prompts, and pictures of each.
        shapes_prompts, shapes_pairs: prompts of one and of two objects, where the data are shapes.

    Raises:
        UserError: naming the value that is out of its range.
    """

    seed: int = 0
    samples: int = 1500
    train_samples: int = 5000
    loss_samples: int = 256
    time_bins: int = 8
    resamples: int = 1000
    set_resamples: int = 100
    confidence: float = 0.95
    features: tuple[str, ...] = (DEFAULT_NETWORK,)
    clip: str | None = None
    ratios: tuple[float, ...] = (0.5, 2 / 3, 1.5, 2.0)
    aspect_prompts: int = 48
    camera_prompts: int = 48
    camera_shift: float = 0.25
    camera_zoom: float = 1.25
    diversity_prompts: int = 24
    diversity_seeds: int = 6
    shapes_prompts: int = 128
    shapes_pairs: int = 64

    def __post_init__(self) -> None:
        for name, fewest in _FEWEST.items():
            if getattr(self, name) < fewest:
                raise UserError(f"is {getattr(self, name)}, expected at least {fewest}", where=_option(name))
        if not 0 < self.confidence < 1:
            raise UserError(f"is {self.confidence}, expected between 0 and 1", where="--confidence")
        if not 0 < self.camera_shift < 1:
            hint = "give a part of half the side, e.g. 0.25; what moves farther leaves too little to compare"
            raise UserError(f"is {self.camera_shift}, expected above 0 and below 1", where="--camera-shift", hint=hint)
        if not self.camera_zoom > 0:
            raise UserError(f"is {self.camera_zoom}, expected above 0", where="--camera-zoom", hint="e.g. 1.25")
        if self.seed < 0:
            raise UserError(f"is {self.seed}, expected at least 0", where="--seed")

    @property
    def bootstrap(self) -> Bootstrap:
        """For averages and kernel distances."""
        return Bootstrap(self.resamples, self.seed, self.confidence)

    @property
    def set_bootstrap(self) -> Bootstrap:
        """For what is costly to resample."""
        return Bootstrap(self.set_resamples, self.seed, self.confidence)

    def to_json(self) -> dict[str, Any]:
        """All settings as plain values."""
        return asdict(self)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
