"""A raw sample to what training sees of it: crop, caption, tokens.

Shapes: H×W pixels of the crop, L token places.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.captions import names_a_side
from hdm_lightning.data.config import StreamConfig
from hdm_lightning.data.crops import Crop
from hdm_lightning.data.decode import decode
from hdm_lightning.data.faults import Quarantine, SampleFault
from hdm_lightning.data.members import RawSample
from hdm_lightning.data.plan import Plan
from hdm_lightning.data.randomness import Draws
from hdm_lightning.data.reader import Reader

Tokenise = Callable[[str], tuple[list[int], int]]
"""A caption to its token numbers and how many of them are true (the rest is padding)."""


@dataclass(slots=True)
class Sample:
    """One prepared sample, or a hole (weight 0; `fault` says why, and is empty for mere padding)."""

    index: int
    key: str
    image: NDArray[np.uint8]
    """uint8 (H,W,3), RGB."""
    crop: tuple[float, float, float, float]
    tokens: list[int]
    length: int
    caption: str
    weight: float = 1.0
    fault: str = ""


class Preparation:
    """Prepares the samples of a stream. One a process.

    Args:
        config, plan: the stream and its order.
        tokenise: what makes tokens of a caption.
        training: False for validation: the first caption, whole, never dropped.
    """

    def __init__(self, config: StreamConfig, plan: Plan, tokenise: Tokenise, *, training: bool) -> None:
        self.config, self.plan, self.tokenise, self.training = config, plan, tokenise, training
        self._reader = Reader(plan)
        self._quarantine = Quarantine(config.quarantine)

    def sample(self, index: int) -> Sample:
        """The sample at a position of the global order, or a hole in its place."""
        place = self.plan.locate(index)
        raw = None
        try:
            raw = self._reader.read(place)
            return self._prepare(index, self._reader.address(place).shard.record.name, raw)
        except SampleFault as fault:
            address = self._reader.address(place)
            name, key = address.shard.record.name, raw.key if raw else f"#{address.ordinal}"
            self._quarantine.add(
                shard=address.shard.url, key=key, ordinal=address.ordinal, reason=str(fault), index=index
            )
            return self.hole(index, f"{name}/{key}", str(fault))

    def hole(self, index: int, key: str = "", fault: str = "") -> Sample:
        """What stands in the place of a sample that cannot be used."""
        height, width = self.plan.shape_at(index)
        image = np.zeros((height, width, 3), dtype=np.uint8)
        tokens = [0] * self.config.context_length
        return Sample(index, key, image, (0.0, 0.0, float(height), float(width)), tokens, 1, "", 0.0, fault)

    def _prepare(self, index: int, shard: str, raw: RawSample) -> Sample:
        config = self.config
        caption, may_flip = self._caption(index, raw)
        draws = Draws(config.seed, config.stage, index, "crop")

        shape = self.plan.shape_at(index)

        def choose(height: int, width: int) -> Crop:
            return config.crop.choose(height, width, shape, draws, may_flip=may_flip)

        image, crop = decode(raw.image(), choose)
        tokens, length = self._tokens(caption)
        return Sample(index, f"{shard}/{raw.key}", image, crop.numbers, tokens, length, caption)

    def _caption(self, index: int, raw: RawSample) -> tuple[str, bool]:
        """The caption as training sees it, and whether the image may be mirrored."""
        rules = self.config.captions
        if not self.training:
            return rules.first(raw.members), False
        draws = Draws(self.config.seed, self.config.stage, index, "caption")
        dropped = draws.uniform() < rules.drop
        caption = rules.choose(raw.members, draws)
        return "" if dropped else caption, self.config.crop.flip and not names_a_side(caption)

    def _tokens(self, caption: str) -> tuple[list[int], int]:
        places = self.config.context_length
        tokens, length = self.tokenise(caption)
        tokens = tokens[:places] + [0] * (places - len(tokens))
        return tokens, max(1, min(length, places))
