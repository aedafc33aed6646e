"""What to evaluate and how, as plain values: each is declared here once, with its range and the help of its flag.

Cheap to import, for `--help`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from hdm_lightning.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from hdm_lightning.metrics.bootstrap import Bootstrap

DEFAULT_NETWORK = "efficientnet_lite0"
SHAPES_PRIMARY = ("shapes.two_unseen_relation_bound", "shapes.one_unseen_colour_and_shape")
PRIMARY = (*SHAPES_PRIMARY, "loss.flow_loss", f"kernel.kernel_{DEFAULT_NETWORK}")
"""The measures that a comparison is about by default: few, so that the correction costs little."""


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Seed and resampling.

    Attributes:
        seed: of images, noise and resampling; image i uses seed + i.
        resamples: for cheap intervals.
        set_resamples: for the Fréchet distance and the neighbor measures, where each costs seconds.
        confidence: share of intervals that contain the true value.
    """

    seed: Annotated[int, Ge(0)] = 0
    resamples: Annotated[int, Ge(2)] = 1000
    set_resamples: Annotated[int, Ge(2)] = 100
    confidence: Annotated[float, Gt(0), Lt(1)] = 0.95

    @property
    def bootstrap(self) -> "Bootstrap":
        """Bootstrap of averages and kernel distances."""
        from hdm_lightning.metrics.bootstrap import Bootstrap  # noqa: PLC0415  (NumPy is slow to import)

        return Bootstrap(self.resamples, self.seed, self.confidence)

    @property
    def set_bootstrap(self) -> "Bootstrap":
        """Bootstrap of measures that are costly to resample."""
        return replace(self.bootstrap, resamples=self.set_resamples)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many images, and how far the camera moves.

    Attributes:
        samples: generated images, and reference images.
        train_samples: training images to use.
        loss_samples: images for the flow loss.
        time_bins: bins of the time.
        aspect_prompts: prompts for each aspect ratio.
        camera_prompts: prompts for each camera move.
        camera_shift: 1 is half a square's side.
        camera_zoom: above 1 is closer.
        diversity_prompts: prompts for diversity.
        diversity_seeds: images of each of them.
        shapes_prompts: prompts of one shape.
        shapes_pairs: prompts of two shapes.
    """

    samples: Annotated[int, Ge(2)] = 1500
    train_samples: Annotated[int, Ge(1)] = 5000
    loss_samples: Annotated[int, Ge(2)] = 256
    time_bins: Annotated[int, Ge(1)] = 8
    aspect_prompts: Annotated[int, Ge(2)] = 48
    camera_prompts: Annotated[int, Ge(2)] = 48
    camera_shift: Annotated[float, Gt(0), Lt(1)] = 0.25
    camera_zoom: Annotated[float, Gt(0)] = 1.25
    diversity_prompts: Annotated[int, Ge(2)] = 24
    diversity_seeds: Annotated[int, Ge(2)] = 6
    shapes_prompts: Annotated[int, Ge(1)] = 128
    shapes_pairs: Annotated[int, Ge(1)] = 64


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Counts, Intervals):
    """All that the numbers depend on besides model and data, as recorded with the results.

    Attributes:
        features: names of feature networks, as for `load_feature_network`.
        clip: CLIP by hub name or folder, for CLIPScore and CMMD.
        ratios: width / height of the images compared with squares of the same area.
    """

    features: tuple[str, ...] = (DEFAULT_NETWORK,)
    clip: str | None = None
    ratios: tuple[float, ...] = (0.5, 2 / 3, 1.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where to compute, and where to write the results.

    Attributes:
        out: folder; by default evaluation/ in the model's or run's folder.
        device: cpu, cuda, cuda:1 …; by default cuda if there is one.
        batch: images at once.
    """

    out: Path | None = None
    device: str | None = None
    batch: Annotated[int, Ge(1)] = 8


@dataclass(frozen=True, kw_only=True)
class ModelRequest(Machine):
    """What to evaluate of a model.

    Attributes:
        model: run, final/ folder, weights file, published file or checkpoint.
        parts: comma-separated names; by default all that are possible.
        data: folders of reference shards with captions, instead of the run's own.
        train_data: folders of training shards, likewise.
        weights: by default all there are.
        text_encoder: name or folder instead of the model's own.
        vae: name or folder instead of the model's own.
        precision: by default bfloat16 on cuda (float16 where it is missing), float32 on the CPU.
        size: side of the square images in pixels.
        settings: counts, seeds, networks.
        drawing: fields of `SamplingSettings` that override the model's own.
    """

    model: Path
    parts: str | None = None
    data: tuple[str, ...] = ()
    train_data: tuple[str, ...] = ()
    weights: tuple[Literal["ema", "raw", "file"], ...] = ()
    text_encoder: str | None = None
    vae: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    size: Annotated[int | None, Ge(1)] = None
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    drawing: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.asked:
            if name not in PARTS:
                raise UserError(f"{name!r} is not a part", where="--parts", hint=did_you_mean(name, PARTS))

    @property
    def asked(self) -> tuple[str, ...]:
        """The parts asked for by name."""
        return tuple(dict.fromkeys(name.strip() for name in (self.parts or "").split(",") if name.strip()))


@dataclass(frozen=True, kw_only=True)
class VaeRequest(Machine, Intervals):
    """What to evaluate of an autoencoder.

    Attributes:
        folder: diffusers AutoencoderKL, or an hdm-train-vae run.
        data: folders of shards with images that it was not trained on.
        size: side of the center squares in pixels.
        on_indivisible: for a size that is not a multiple of the autoencoder's factor: refuse it (default), or pad the
            images by mirroring their edges, and compare without the padding.
        samples: images.
        perceptual: distance to report: efficientnet_lite0, lpips_vgg … or none.
        features: names of feature networks.
        batch: images at once.
    """

    folder: Path
    data: tuple[str, ...]
    size: int = 256
    on_indivisible: Literal["refuse", "pad"] = "refuse"
    samples: Annotated[int, Ge(2)] = 1500
    perceptual: str = DEFAULT_NETWORK
    features: tuple[str, ...] = (DEFAULT_NETWORK,)
    batch: Annotated[int, Ge(1)] = 16


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """Two evaluations to compare.

    Attributes:
        first: an evaluation.json or its folder.
        second: the other model's.
        weights: ema, raw or file; by default the first there are.
        primary: measures that the comparison is about.
        margin: difference of shares, or relative difference of other numbers, within which both count as the same.
        confidence: of intervals; 1 minus it is the level of the tests.
        out: write the result as JSON.
    """

    first: Path
    second: Path
    weights: str | None = None
    primary: str | None = None
    margin: Annotated[float, Gt(0)] = 0.05
    confidence: Annotated[float, Gt(0), Lt(1)] = 0.95
    out: Path | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """The primary measures by name."""
        return tuple(name.strip() for name in (self.primary or "").split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class TrainingsRequest:
    """Trainings of one recipe to summarize.

    Attributes:
        runs: two or more.
        weights: ema, raw or file; by default the first there are.
        confidence: of both intervals.
        out: write the result as JSON.
    """

    runs: tuple[Path, ...]
    weights: str | None = None
    confidence: Annotated[float, Gt(0), Lt(1)] = 0.95
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class CountRequest:
    """Two shares to tell apart.

    Attributes:
        share: share of right answers of one model.
        other: share of the other, to get the number of prompts needed.
        prompts: number of prompts of each model, to get the difference that they detect.
        power: how often the difference is to be detected.
        confidence: 1 minus the level of the test.
        design_effect: how much less prompts of one combination count.
    """

    share: Annotated[float, Ge(0), Le(1)]
    other: Annotated[float | None, Ge(0), Le(1)] = None
    prompts: Annotated[int | None, Ge(1)] = None
    power: Annotated[float, Gt(0), Lt(1)] = 0.8
    confidence: Annotated[float, Gt(0), Lt(1)] = 0.95
    design_effect: Annotated[float, Ge(1)] = 1.0

    def __post_init__(self) -> None:
        if (self.other is None) == (self.prompts is None):
            raise UserError("exactly one of the two is needed", where="OTHER, --prompts", hint="pass one: see --help")
        if self.share == self.other:
            raise UserError("no number of prompts tells equal shares apart", where="OTHER", hint="pass another share")


def ratios_from(text: str) -> tuple[float, ...]:
    """Parse ratios such as 2:3,1.5. Raises UserError: they cannot be parsed, or are beyond 1:10 and 10:1."""
    try:
        pairs = [part.partition(":") for part in text.split(",")]
        ratios = tuple(float(width) / float(height or 1) for width, _, height in pairs)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{text!r} is not a list of ratios", where="--ratios", hint="write 2:3,3:2 or 0.5,2") from error
    if not all(0.1 <= ratio <= 10 for ratio in ratios):
        raise UserError(f"{text!r} goes beyond 1:10 and 10:1", where="--ratios", hint="pass ratios between them")
    return ratios


@dataclass(frozen=True)
class Part:
    """One part; `function` measures it, as `module:name` in this package, imported when it is needed."""

    title: str
    about: str  # a line of help
    function: str


_AGREEMENT = "do images match their captions: CLIPScore with --clip, and a small head trained on the training set"
_KERNEL = "kernel distance on them (KID with --features inception); CMMD with --clip"
_FRECHET = "Fréchet distance on named features (FID with --features inception)"
_NEIGHBOURS = "precision, recall, density, coverage"

PARTS = {
    "loss": Part("Flow loss", "flow loss by time, on held-out and on training images", "flow_loss:measure_loss"),
    "frechet": Part("Fréchet distance", _FRECHET, "set_parts:frechet"),
    "kernel": Part("Kernel distance", _KERNEL, "set_parts:kernel"),
    "neighbours": Part(_NEIGHBOURS.capitalize(), _NEIGHBOURS, "set_parts:neighbours"),
    "agreement": Part("Agreement of images with their captions", _AGREEMENT, "caption_parts:agreement"),
    "shapes": Part(
        "Following prompts of shapes", "following prompts of shapes, if the data are shapes", "caption_parts:shapes"
    ),
    "diversity": Part("Diversity", "how different images of one prompt are", "drawing_parts:diversity"),
    "aspect": Part("Aspect ratios", "other aspect ratios compared with squares", "drawing_parts:aspect"),
    "camera": Part("Camera", "does the image move as x_shift, y_shift and zoom say", "drawing_parts:camera"),
    "copies": Part("Nearest training images", "nearest training images", "copy_search:copies"),
}
"""The parts of an evaluation by their keys on the command line and in the results."""
