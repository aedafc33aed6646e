"""Sampling settings, requests of `hdm-sample` and their checks; imports nothing slow, as CLI flags are made from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge

from hdm_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor  # slow to import, and commands make their flags from the settings

Solver = Literal["euler", "heun", "ab2", "ab3"]
"""The names in `diffusion.sampling.SOLVERS`; ab2 and ab3 are Adams–Bashforth."""
OnIndivisible = Literal["refuse", "pad"]

MAX_SEED = 2**63 - 1
MOST_PIXELS, MOST_STEPS = 2**26, 100_000
"""Limits beyond the use of any model, so a record from elsewhere cannot exhaust the memory."""
LARGEST = 1e6
"""Limit of guidance, shift and camera: JSON may contain integers beyond the range of floats."""

_KINDS: Mapping[Any, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a string"),
}


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling settings shared by a batch of images.

    Attributes:
        height, width: size in pixels, multiples of autoencoder factor × patch unless padded.
        negative_prompt: text to guide away from, in the unconditional branch of classifier-free guidance.
        steps: solver steps.
        solver: euler, heun, ab2 or ab3 (`diffusion.sampling.SOLVERS`).
        shift: time-grid shift; above 1 spends more steps near noise.
        guidance_scale: scale of classifier-free guidance; 1 turns it off.
        guidance_interval: times (low, high) within which classifier-free guidance acts; 1 is noise.
        routing_scale: scale of guidance away from a prediction with more routed tokens; 1 turns it off.
        conditional_rate: share of image tokens that skip the U in the main branch.
        unconditional_rate: the same in the unconditional branch of classifier-free guidance.
        weak_rate: the same in the weak branch of routing guidance; above `conditional_rate`.
        x_shift: camera shift to the right; 1 is half the side of a square image.
        y_shift: camera shift down, in the same unit.
        zoom: camera zoom; above 1 is closer.
        strength: image-to-image: time in (0, 1] at which the start image is mixed with noise.
        on_indivisible: what to do with a size that does not fit the model: "refuse" it, or "pad" it to the next
            multiples (a start image by mirroring its edges) and crop the result.

    Raises:
        ValueError: a setting is out of range; names it.
    """

    height: int = 256
    width: int = 256
    negative_prompt: str = ""
    steps: int = 28
    solver: Solver = "ab2"
    shift: float = 1.0
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    routing_scale: float = 1.0
    conditional_rate: float = 0.0
    unconditional_rate: float = 0.0
    weak_rate: float = 0.5
    x_shift: float = 0.0
    y_shift: float = 0.0
    zoom: float = 1.0
    strength: float = 1.0
    on_indivisible: OnIndivisible = "refuse"

    def __post_init__(self) -> None:
        self._require_kinds()
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        for name, known in (("solver", get_args(Solver)), ("on_indivisible", get_args(OnIndivisible))):
            self._require(getattr(self, name) in known, name, f"one of {', '.join(known)}")
        for name in ("height", "width", "steps"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.steps <= MOST_STEPS, "steps", f"at most {MOST_STEPS}")
        pixels = self.height * self.width
        self._require(pixels <= MOST_PIXELS, "height", f"at most {MOST_PIXELS:,} pixels with the width {self.width}")
        for name in ("shift", "guidance_scale", "routing_scale", "x_shift", "y_shift", "zoom"):
            self._require(abs(getattr(self, name)) <= LARGEST, name, f"a number of at most {LARGEST:g}")
        for name in ("shift", "zoom"):
            self._require(getattr(self, name) > 0.0, name, "above 0")
        for name in ("conditional_rate", "unconditional_rate", "weak_rate"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "at least 0 and below 1")
        self._require(0.0 < self.strength <= 1.0, "strength", "above 0 and at most 1")
        interval = self.guidance_interval
        ordered = len(interval) == 2 and 0.0 <= interval[0] <= interval[1] <= 1.0
        self._require(ordered, "guidance_interval", "two times with 0 ≤ low ≤ high ≤ 1")
        if self.routing_scale != 1.0:
            stronger = self.weak_rate > self.conditional_rate
            self._require(stronger, "weak_rate", f"above conditional_rate {self.conditional_rate}")

    def _require_kinds(self) -> None:
        """Check types: records and configurations from elsewhere may contain anything."""
        for each in fields(self):
            kind, what = _KINDS.get(each.type, (object, ""))
            value = getattr(self, each.name)
            self._require(isinstance(value, kind) and not isinstance(value, bool), each.name, what)
        interval = self.guidance_interval
        numbers = isinstance(interval, tuple | list) and all(isinstance(time, Real) for time in interval)
        self._require(numbers, "guidance_interval", "two times with 0 ≤ low ≤ high ≤ 1")

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    def to_json(self) -> dict[str, Any]:
        """Return all settings as plain values."""
        return {**asdict(self), "guidance_interval": list(self.guidance_interval)}

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> "SamplingSettings":
        """Read the settings that `to_json` wrote; missing ones take their defaults.

        Raises:
            ValueError: a key is unknown or a value is out of range.
        """
        known = [each.name for each in fields(cls)]
        unknown = sorted(set(mapping) - set(known))
        if unknown:
            raise ValueError(f"unknown sampling settings {unknown}, expected some of {known}")
        return cls(**mapping)


_HINTS = get_type_hints(SamplingSettings)
SamplingChanges: Any = make_dataclass(
    "SamplingChanges",
    [(each.name, _HINTS[each.name], None) for each in fields(SamplingSettings) if each.name not in ("height", "width")],
    namespace={"__doc__": SamplingSettings.__doc__},
)
"""The settings set by options; None keeps the model's own."""


@dataclass(frozen=True)
class DrawingRequest:
    """What to generate.

    Attributes:
        model: run, pipeline folder, weights file or hub name.
        prompts: text prompts.
        prompt_file: file with one prompt per line; - is standard input.
        count: images per prompt.
        seed: seed of a prompt's first image, incremented for the others (default: 0).
        size: in pixels, or: image, the size of --image; may be repeated.
        repeat: generate this image again from its own settings.
        image: start from this image (image-to-image).
        out: output folder.
        sheet: write a contact sheet if there are several images.
    """

    model: str | None = None
    prompts: tuple[str, ...] = ()
    prompt_file: str | None = None
    count: Annotated[int, Ge(1)] = 1
    seed: Annotated[int | None, Ge(0)] = None
    size: list[str] = field(default_factory=list)
    repeat: Path | None = None
    image: Path | None = None
    out: Path = Path("samples")
    sheet: bool = True


@dataclass(frozen=True)
class DrawingMachine:
    """How and where to load the model.

    Attributes:
        weights: averaged or last weights.
        lora: apply a LoRA, NAME or NAME:WEIGHT; may be repeated.
        any_base: accept a LoRA trained on other weights of this shape.
        text_encoder, vae: name or folder instead of the model's own.
        device: cpu, cuda, cuda:1 … (default: cuda if available).
        precision: of the network (default: float32 on cpu; on cuda bfloat16, or float16 on older GPUs).
        batch: images per batch.
        compile: compile the network block by block: half a minute for each size on a GPU, then faster.
    """

    weights: Literal["ema", "raw"] = "ema"
    lora: list[str] = field(default_factory=list)
    any_base: bool = False
    text_encoder: str | None = None
    vae: str | None = None
    device: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    batch: Annotated[int, Ge(1)] = 8
    compile: bool = False


def require_fit(where: str, what: str, got: int, expected: int) -> None:
    """Raise UserError if an encoder does not fit the network."""
    if got != expected:
        raise UserError(
            f"has {got} {what}, but the network expects {expected}",
            where=where,
            hint="use the one the network was trained with",
        )


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError if a seed is out of range."""
    if not all(0 <= seed <= MAX_SEED for seed in seeds):
        raise ValueError(f"seeds: got {list(seeds)}, expected 0 … 2⁶³ − 1")


def check_request(
    prompts: Sequence[str], seeds: int, settings: SamplingSettings, images: "Tensor | None", multiple: int
) -> None:
    """Raise ValueError, naming the argument, if the arguments do not fit each other or the model.

    `seeds` is their number; `images` are start images, uint8 (B, 3, H, W); sizes must be multiples of `multiple`,
    unless they are padded.
    """
    if not prompts or len(prompts) != seeds:
        raise ValueError(f"seeds: got {seeds} for {len(prompts)} prompts, expected one per prompt")
    for name in ("height", "width"):
        if getattr(settings, name) % multiple and settings.on_indivisible == "refuse":
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected a multiple of {multiple}")
    if images is not None:
        expected = (len(prompts), 3, settings.height, settings.width)
        if tuple(images.shape) != expected or str(images.dtype) != "torch.uint8":
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, expected uint8 {expected}")
