"""How an image is drawn, what `hdm-sample` can be asked, and whether it can be done; light, as flags are made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge

from hdm_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor  # slow to import, and commands make their flags of the settings

Solver = Literal["euler", "heun", "ab2", "ab3"]
"""The names in `diffusion.sampling.SOLVERS`; ab2 and ab3 are Adams–Bashforth."""
OnIndivisible = Literal["refuse", "pad"]

MAX_SEED = 2**63 - 1
MOST_PIXELS, MOST_STEPS = 2**26, 100_000
"""Of an image; beyond what any model draws, so that a record of somebody else's does not fill the memory."""
LARGEST = 1e6
"""Of guidance, shift and camera: JSON may hold whole numbers beyond all floats."""

_KINDS: Mapping[Any, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
}


@dataclass(frozen=True)
class SamplingSettings:
    """Settings that a batch of images shares.

    Attributes:
        height, width: size in pixels, multiples of autoencoder factor × patch unless they are padded.
        negative_prompt: what to guide away from: the text of the unconditional branch of classifier-free guidance.
        steps: solver steps.
        solver: euler, heun, ab2 or ab3 (`diffusion.sampling.SOLVERS`).
        shift: time-grid shift; above 1 spends more steps near noise.
        guidance_scale: classifier-free guidance; 1 is none.
        guidance_interval: times (low, high) within which classifier-free guidance acts; 1 is noise.
        routing_scale: routing guidance, away from a prediction with more routed tokens; 1 is none.
        conditional_rate: share of image tokens that skip the U in the main branch.
        unconditional_rate: the same in the unconditional branch of classifier-free guidance.
        weak_rate: the same in the weak branch of routing guidance; above `conditional_rate`.
        x_shift: camera to the right; 1 is half the side of a square image.
        y_shift: camera down, in the same unit.
        zoom: camera zoom; above 1 is closer.
        strength: image-to-image, the time in (0, 1] at which the given image is mixed with noise.
        on_indivisible: what to do with a size that the model cannot draw: "refuse" it, or "pad" it to the next
            multiples (a given image by mirroring its edges) and crop the result.

    Raises:
        ValueError: naming the setting that is out of its range.
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
        """Records and configurations of others may hold anything."""
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
        """All settings as plain values."""
        return {**asdict(self), "guidance_interval": list(self.guidance_interval)}

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> "SamplingSettings":
        """The settings that `to_json` wrote; those left out take their defaults.

        Raises:
            ValueError: for an unknown key or a value out of its range.
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
"""The settings of which an option is given; None leaves the model's own."""


@dataclass(frozen=True)
class DrawingRequest:
    """What to draw.

    Attributes:
        model: run, pipeline's folder, weights file or hub name.
        prompts: what to draw.
        prompt_file: one prompt a line; - is standard input.
        count: images of each prompt.
        seed: first seed, counted up (default: 0).
        size: in pixels, or: image, that of --image; may be repeated.
        repeat: draw this image again from its own settings.
        image: start from this image (image-to-image).
        out: folder.
        sheet: a contact sheet where there are several images.
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
    """Which model, and where.

    Attributes:
        weights: averaged or last weights.
        lora: draw with a LoRA, NAME or NAME:WEIGHT; may be repeated.
        any_base: draw also with a LoRA that was trained on other weights of this shape.
        text_encoder, vae: name or folder instead of the model's own.
        device: cpu, cuda, cuda:1 … (default: cuda if there is one).
        precision: of the network (default: float32 on cpu, bfloat16 or float16 on cuda, as the card computes in it).
        batch: images at once.
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
            f"gives {got} {what}, while the network was made for {expected}",
            where=where,
            hint="use the one the network was trained with",
        )


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless all are seeds of a generator."""
    if not all(0 <= seed <= MAX_SEED for seed in seeds):
        raise ValueError(f"seeds: got {list(seeds)}, expected 0 … 2⁶³ − 1")


def check_request(
    prompts: Sequence[str], seeds: int, settings: SamplingSettings, images: "Tensor | None", multiple: int
) -> None:
    """Raise ValueError, naming the argument, unless B prompts can be drawn with so many seeds.

    `images` are uint8 (B, 3, H, W) to start from; `multiple` divides heights and widths, unless they are padded.
    """
    if not prompts or len(prompts) != seeds:
        raise ValueError(f"seeds: got {seeds} for {len(prompts)} prompts, expected one each")
    for name in ("height", "width"):
        if getattr(settings, name) % multiple and settings.on_indivisible == "refuse":
            raise ValueError(f"{name}: got {getattr(settings, name)}, expected a multiple of {multiple}")
    if images is not None:
        expected = (len(prompts), 3, settings.height, settings.width)
        if tuple(images.shape) != expected or str(images.dtype) != "torch.uint8":
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, expected uint8 {expected}")
