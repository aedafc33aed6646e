"""What a stream of samples is made from, as plain values."""

from dataclasses import dataclass, field

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.crops import CropRules
from hdm_lightning.errors import UserError


@dataclass(frozen=True)
class Source:
    """Shards that belong together.

    Attributes:
        urls: folders, shards (`…/0000.tar`) or brace patterns (`…/{0000..0099}.tar`), local or remote.
        weight: share of the samples that come from this source, relative to the other sources; None for its number
            of samples. Give it for all sources or for none.
        index: where the index lies, if not beside the shards.
    """

    urls: tuple[str, ...]
    weight: float | None = None
    index: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.urls, str):  # a lone address would pass for a sequence of letters
            object.__setattr__(self, "urls", (self.urls,))


@dataclass(frozen=True)
class StreamConfig:
    """A stream of samples: where from, in which order, cut and captioned how.

    Attributes:
        sources: at least one.
        resolution: side of the square crop in pixels.
        context_length: token places of a caption.
        seed, stage: what order, crops and captions depend on.
        crop, captions: the rules.
        lanes: places of the data that are read side by side; world sizes that divide it read no byte twice.
        window: samples that are shuffled together within a lane (the shuffle spans lanes × window samples).
        workers: processes that prepare samples on each rank, rounded down so that each has lanes of its own; 0 works
            in the training process.
        max_bad_share: share of unusable samples, of the latest ones of a rank, at which the run stops.
        bad_patience: samples to see before that share is judged; 10 to 20 times as many count as the latest.
        quarantine: file that gets one line of JSON a bad sample, or None.
        cache_dir, cache_gb: where copies of remote shards are kept, and how much of them; None for no copies.
        memory_cache_gb: decoded small images that each worker keeps, for tiny sets.
    """

    sources: tuple[Source, ...]
    resolution: int
    context_length: int
    seed: int = 0
    stage: str = ""
    crop: CropRules = field(default_factory=CropRules)
    captions: CaptionRules = field(default_factory=CaptionRules)
    lanes: int = 96
    window: int = 32
    workers: int = 0
    max_bad_share: float = 0.05
    bad_patience: int = 1000
    quarantine: str | None = None
    cache_dir: str | None = None
    cache_gb: float = 100.0
    memory_cache_gb: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("resolution", 1), ("context_length", 1), ("lanes", 1), ("window", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"is {getattr(self, name)}", where=f"data.{name}", hint=f"give {least} or more")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"is {self.max_bad_share}", where="data.max_bad_share", hint="give a share from 0 to 1")
