"""From a raw sample to what training sees of it: crop, caption, tokens; and a stream of such samples without Lightning.

Shapes: H×W pixels of the crop or of the resized full image, L tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdm_lightning.data.alpha_masks import decode_masked
from hdm_lightning.data.captions import names_a_side
from hdm_lightning.data.crops import Crop, Shape
from hdm_lightning.data.decode import decode, upright_size
from hdm_lightning.data.faults import FaultMeter, Quarantine, SampleFault
from hdm_lightning.data.latent_sets import Moments
from hdm_lightning.data.order import first_position
from hdm_lightning.data.randomness import Draws
from hdm_lightning.data.reader import Reader
from hdm_lightning.data.rules import StreamConfig
from hdm_lightning.data.sample_plan import Place, Plan
from hdm_lightning.data.sample_table import IMAGE_EXTENSIONS, RawSample
from hdm_lightning.errors import UserError

Tokenize = Callable[[str], tuple[list[int], int]]
"""Maps a caption to its token ids and their count without padding."""


@dataclass(slots=True)
class Sample:
    """One prepared sample, or a masked one (weight 0; `fault` is the reason, or empty for padding)."""

    index: int
    key: str
    image: NDArray[np.uint8] | Moments
    """uint8 (3,H,W) RGB, (4,H,W) with `alpha: mask`, or moments of a latent, float16 (M,C,H/f,W/f); may be a view."""
    crop: tuple[float, float, float, float]
    tokens: list[int]
    length: int
    caption: str
    weight: float = 1.0
    fault: str = ""


class Decoded(NamedTuple):
    """A sample without the encoded image, the upright size of its original, and its resized full image."""

    raw: RawSample
    height: int
    width: int
    pixels: NDArray[np.uint8]
    """uint8 (3,H,W), RGB, or (4,H,W) with alpha."""

    def cut(self, crop: Crop) -> NDArray[np.uint8]:
        """Return the pixels of a crop of the full image, as a view."""
        whole = self.pixels[:, :, ::-1] if crop.flip else self.pixels
        return whole[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


class Preparation:
    """Prepares the samples of a stream; each process has its own instance.

    Args:
        config, plan, tokenize: the stream, its order and its tokenizer.
        training: False for validation, which uses the first caption in full and never drops it.
        stop: see `Reader`.
    """

    def __init__(
        self, config: StreamConfig, plan: Plan, tokenize: Tokenize, *, training: bool, stop: int | None = None
    ) -> None:
        if plan.latents is not None:
            plan.latents.check(config.crop, config.resolution)
            if config.alpha == "mask":
                what = "latents from disk have no transparency"
                raise UserError(what, where="data.alpha", hint="train on the image shards, or set data.alpha=white")
        self._decode = decode_masked if config.alpha == "mask" else decode
        self.config, self.plan, self.tokenize, self.training = config, plan, tokenize, training
        self._reader = Reader(plan, config, stop=stop)
        self._quarantine = Quarantine(config.quarantine)
        self._room = int(config.memory_cache_gb * 1e9)
        self._kept: dict[tuple[int, int, int], Decoded] = {}
        """Samples kept in memory, for tiny sets, so that later passes need neither file nor decoder; never evicted."""

    def sample(self, index: int) -> Sample:
        """Return the sample at a position of the global order, masked if it cannot be used."""
        place = self.plan.locate(index)
        raw = None
        try:
            kept = self._kept.get(place.key)
            raw = kept.raw if kept is not None else self._reader.read(place)
            return self._prepare(index, place, raw, kept)
        except SampleFault as fault:
            return self._faulty(index, place, raw.key if raw is not None else None, str(fault))

    def caption_length(self, index: int) -> int:
        """Return the token count of the caption at a position, without decoding the image.

        Raises:
            SampleFault: the sample cannot be read.
        """
        caption, _ = self._caption(index, self._reader.read(self.plan.locate(index)))
        return self._tokens(caption)[1]

    def masked(self, index: int, key: str = "", fault: str = "") -> Sample:
        """Return the placeholder for a sample that cannot be used."""
        height, width = self.plan.shape_at(index)
        image: NDArray[np.uint8] | Moments
        if self.plan.latents is not None:
            image = self.plan.latents.masked((height, width))
        else:
            image = np.zeros((4 if self.config.alpha == "mask" else 3, height, width), dtype=np.uint8)
        tokens = [0] * self.config.context_length
        return Sample(index, key, image, (0.0, 0.0, float(height), float(width)), tokens, 1, "", 0.0, fault)

    def _faulty(self, index: int, place: Place, key: str | None, reason: str) -> Sample:
        address = self._reader.address(place)
        key = f"#{address.ordinal}" if key is None else key
        self._quarantine.add(shard=address.shard.url, key=key, ordinal=address.ordinal, reason=reason, index=index)
        return self.masked(index, f"{address.shard.record.name}/{key}", reason)

    def _prepare(self, index: int, place: Place, raw: RawSample, kept: Decoded | None) -> Sample:
        config = self.config
        caption, may_flip = self._caption(index, raw)
        draws, shape = Draws(config.seed, config.stage, index, "crop"), self.plan.shape_at(index)
        choose = partial(config.crop.choose, shape=shape, draws=draws, may_flip=may_flip)
        image: NDArray[np.uint8] | Moments
        if self.plan.latents is not None:
            image, crop = self.plan.latents.cut(raw.members, config.crop, shape, draws)
        elif config.memory_cache_gb > 0:
            kept = kept or self._decoded(place, raw, shape)
            crop = choose(kept.height, kept.width)
            image = kept.cut(crop)
        else:
            image, crop = self._decode(raw.image(), choose)
        tokens, length = self._tokens(caption)
        shard = self.plan.parts[place.part].shards[place.shard].record.name
        return Sample(index, f"{shard}/{raw.key}", image, crop.numbers, tokens, length, caption)

    def _decoded(self, place: Place, raw: RawSample, shape: Shape) -> Decoded:
        """Decode the full image of a sample, and keep it in memory if there is room."""
        height, width = upright_size(raw.image())
        crop = self.config.crop.choose(height, width, shape, Draws())
        whole = replace(crop, top=0, left=0, height=crop.full_height, width=crop.full_width, flip=False)
        pixels, _ = self._decode(raw.image(), lambda *_: whole)
        texts = {name: data for name, data in raw.members.items() if name not in IMAGE_EXTENSIONS}
        decoded = Decoded(RawSample(raw.key, texts), height, width, np.ascontiguousarray(pixels))
        if self._room >= pixels.size:
            self._room -= pixels.size
            self._kept[place.key] = decoded
        return decoded

    def _caption(self, index: int, raw: RawSample) -> tuple[str, bool]:
        """Return the caption as training sees it, and whether the image may be mirrored."""
        rules = self.config.captions
        if not self.training:
            return rules.first(raw.members), False
        draws = Draws(self.config.seed, self.config.stage, index, "caption")
        dropped = draws.uniform() < rules.drop
        caption = rules.choose(raw.members, draws)
        return "" if dropped else caption, self.config.crop.flip and not names_a_side(caption)

    def _tokens(self, caption: str) -> tuple[list[int], int]:
        places = self.config.context_length
        tokens, length = self.tokenize(caption)
        tokens = tokens[:places] + [0] * (places - len(tokens))
        return tokens, max(1, min(length, places))


def stream(
    config: StreamConfig,
    tokenize: Tokenize,
    *,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    stop: int | None = None,
    training: bool = True,
    plan: Plan | None = None,
) -> Iterator[Sample]:
    """Yield the samples of one rank in the order of their global positions, loading them in this process.

    Args:
        config: the stream.
        tokenize: maps a caption to (token ids, count without padding).
        rank, world: this rank has the positions g = rank (mod world).
        start: first global position, the number of samples consumed so far.
        stop: global position to stop before; None for an endless stream.
        training: False for the first caption and no dropout.
        plan: the plan of the config, if there is one already.

    Raises:
        UserError: too many samples are bad, or the stream cannot be set up.
    """
    preparation = Preparation(config, plan or Plan(config), tokenize, training=training)
    meter = FaultMeter(config.max_bad_share, config.bad_patience, config.quarantine)
    position = first_position(start, rank, world)
    while stop is None or position < stop:
        sample = preparation.sample(position)
        meter.count(sample.fault or None)
        yield sample
        position += world
