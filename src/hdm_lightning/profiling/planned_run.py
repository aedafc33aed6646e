"""What is to be trained, as plain values: network, encoders, data and stages."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from annotated_types import Gt

from hdm_lightning.data.caption_lengths import padded_lengths
from hdm_lightning.encoders.autoencoder import MAX_PIXELS
from hdm_lightning.encoders.text import MAX_TOKENS
from hdm_lightning.errors import UserError
from hdm_lightning.models import XUTConfig
from hdm_lightning.profiling.encoder_costs import AutoencoderArchitecture, TextArchitecture
from hdm_lightning.profiling.operations import (
    BLOCKS,
    TRAINING_FACTOR,
    AdapterCost,
    Operations,
    Workload,
    adapter_operations,
    forward_flops,
    network_operations,
    network_parts,
    parameter_count,
)
from hdm_lightning.profiling.padding import even_lengths, padded_shares

WHOLE_IMAGE = 1.3
"""Cells or pixels of a whole resized image over those of its square crop, about."""
LENGTHS = 64
"""Captions that stand for all, evenly spaced over how long they are."""
HEADERS = 3000
"""Bytes of a sample of latents besides its moments, about: headers, caption, record."""


@dataclass(frozen=True)
class StageRecipe:
    """One stage; sizes in pixels, progress in samples."""

    name: str
    resolution: int  # side of the square crop
    samples: int  # samples seen, all devices together
    batch_size: int  # samples of an optimizer step, all devices together
    micro_batch_size: int  # samples that one device takes at once
    routing_rate: float = 0.0  # share of image tokens that skip the U
    context_length: int = 256  # caption tokens
    # whether the blocks' activations are recomputed; `selective`: all but attention
    checkpointing: bool | Literal["selective"] = False
    warmup_samples: int = 0  # samples of the warm-up
    cached: bool = False  # whether it reads latents from disk, so that no image is decoded or encoded
    text_stored: bool = False  # whether it reads text states from disk, so that no caption is encoded
    accumulation: int = 1  # micro-batches of a step on one device, which are made by the length of captions

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return -(-self.samples // self.batch_size)


@dataclass
class Dataset:
    """The training set, as far as disks and decoders care."""

    images: Annotated[int, Gt(0)] = 8_469_000  # different images
    image_kb: Annotated[float, Gt(0)] = 250.0  # mean size of an encoded image with its caption, 10^3 bytes
    image_mpx: Annotated[float, Gt(0)] = 2.0  # mean size of an encoded image in megapixels
    latents: bool = False  # whether all stages read latents from disk (hdm-shards encode)
    # tokens of a caption: the mean, or quantiles evenly spaced from the least to the greatest; None fills the context
    caption_tokens: Any = None

    def __post_init__(self) -> None:
        """Raise UserError: the captions' lengths are neither of the two."""
        given = self.caption_tokens
        numbers = given if isinstance(given, list | tuple) else [given]
        fine = all(isinstance(each, int | float) and each >= 1 for each in numbers) and list(numbers) == sorted(numbers)
        if given is not None and not (fine and (numbers is not given or len(given) > 1)):
            hint = "give the mean of 1 or more, or rising quantiles, e.g. [8,40,64,96,256]"
            raise UserError(f"is {given}", where="dataset.caption_tokens", hint=hint)


@dataclass(frozen=True)
class Recipe:
    """A whole schedule."""

    network: XUTConfig
    stages: tuple[StageRecipe, ...]
    text: TextArchitecture
    autoencoder: AutoencoderArchitecture
    dataset: Dataset = field(default_factory=Dataset)
    text_lengths: Any = "padded"  # what captions are padded to; see `data.caption_lengths`
    text_max_tokens: int = MAX_TOKENS  # of the captions encoded at once, together; one caption always is
    autoencoder_max_pixels: int = MAX_PIXELS  # of the images encoded at once, together; one image always is
    averages: int = 1  # weight averages kept
    muon: bool = False  # whether Muon trains the blocks' matrices, with one moment, and AdamW with two the rest
    compiled: bool = True  # whether the network is compiled
    half_gradients: bool = False  # whether gradients are exchanged in bfloat16
    moment_bytes: float = 4.0  # of an element of a moment: 4, or a bit more than 1 with moments of 8 bits
    sharded: bool = False  # whether weights, gradients, moments and averages are split over the devices (FSDP2)
    mixed: bool = True  # bfloat16 autocast over float32 weights; otherwise everything is float32
    checkpoints_kept: int = 2  # of each stage
    overlapped: bool = False  # whether a micro-batch is encoded while the network works on the one before
    adapter: AdapterCost | None = None  # what alone is trained, beside the frozen network; None trains all of it

    @property
    def parameters(self) -> int:
        """Parameters of the network, and of the adapter beside it."""
        return parameter_count(self.network) + (self.adapter.trained if self.adapter else 0)

    @property
    def trained(self) -> int:
        """Parameters that have gradients, moments and averages, and are saved."""
        return self.adapter.trained if self.adapter else self.parameters

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps."""
        if self.adapter is not None:
            blocks = sum(self.adapter.parameters.get(name, 0) for name in BLOCKS)
        else:
            parts = network_parts(self.network)
            blocks = sum(parts[name].parameters for name in BLOCKS)  # nearly all of a block is matrices
        return 2 * self.trained - (blocks if self.muon else 0)

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation."""
        return 2 if self.mixed else 4

    def work(self, stage: StageRecipe) -> Workload:
        """Tokens of one sample of a stage.

        Raises:
            ValueError: the resolution is not a multiple of autoencoder factor × patch.
        """
        side, rest = divmod(stage.resolution, self.autoencoder.factor)
        if rest:
            raise ValueError(f"resolution is {stage.resolution}; expected a multiple of {self.autoencoder.factor}")
        return Workload.of(self.network, side, side, stage.context_length, rate=stage.routing_rate)

    def padded(self, stage: StageRecipe) -> list[tuple[float, StageRecipe]]:
        """Shares of a stage's samples, each with the stage as if its context were what their captions are padded to."""
        lengths = padded_lengths(self.text_lengths, stage.context_length, accelerated=True)
        if self.dataset.caption_tokens is None or not lengths:
            return [(1.0, stage)]
        shares = padded_shares(self.dataset.caption_tokens, lengths, stage.micro_batch_size, stage.accumulation)
        return [(share, replace(stage, context_length=length)) for length, share in shares.items()]

    def operations(self, stage: StageRecipe, *, fused_attention: bool = True) -> Operations:
        """Mean operations of one sample of a stage, its caption padded."""
        parts = [(share, self._operations(each, fused_attention)) for share, each in self.padded(stage)]
        if len(parts) == 1:
            return parts[0][1]
        names = [entry.name for entry in fields(Operations)]
        return Operations(**{name: round(sum(share * getattr(one, name) for share, one in parts)) for name in names})

    def true_lengths(self, stage: StageRecipe) -> list[int]:
        """Tokens of captions of a stage without their padding, evenly spaced over how long they are."""
        captions = self.dataset.caption_tokens
        return [stage.context_length] if captions is None else even_lengths(captions, stage.context_length)

    def useful_flops(self, stage: StageRecipe) -> float:
        """Mean model FLOPs of one sample in the network, padding left out: what MFU counts."""
        works = [self.work(replace(stage, context_length=length)) for length in self.true_lengths(stage)]
        if self.adapter is not None:
            plain = [
                adapter_operations(self.network, work, self.adapter, recompute=False, fused_attention=False)
                for work in works
            ]
            return sum(each.network for each in plain) / len(plain)
        flops = (TRAINING_FACTOR * sum(forward_flops(self.network, work).values()) for work in works)
        return sum(flops) / len(works)

    def encoded_resolutions(self) -> list[int]:
        """Resolutions at which every image is encoded once, before the training."""
        return sorted({stage.resolution for stage in self.stages if stage.cached})

    def _operations(self, stage: StageRecipe, fused_attention: bool) -> Operations:
        work, side = self.work(stage), stage.resolution
        how: dict[str, Any] = {"recompute": stage.checkpointing, "fused_attention": fused_attention}
        if self.adapter is None:
            network = network_operations(self.network, work, **how)
        else:
            network = adapter_operations(self.network, work, self.adapter, **how)
        encode = 0 if stage.cached else self.autoencoder.encode_flops(side, side)
        text = 0 if stage.text_stored else self.text.flops(stage.context_length)
        return replace(network, autoencoder=encode, text=text)

    def stored_lengths(self) -> list[int]:
        """Tokens of the captions that are encoded before the training, for every `LENGTHS` images.

        Each caption is encoded as every context length that reads states cuts it, once where two leave it alike.
        """
        contexts = sorted({stage.context_length for stage in self.stages if stage.text_stored})
        captions = self.dataset.caption_tokens
        cut = [[each] * LENGTHS if captions is None else even_lengths(captions, each, LENGTHS) for each in contexts]
        before = [[0] * LENGTHS, *cut]
        pairs = (zip(*each, strict=True) for each in zip(cut, before, strict=False))
        return [new for pair in pairs for new, old in pair if new != old]

    def state_kb(self, tokens: float) -> float:
        """Stored states of so many tokens, 10^3 bytes."""
        return tokens * self.text.width * self.element_bytes / 1e3

    def sample_kb(self, stage: StageRecipe) -> float:
        """What is read from disk of a sample, 10^3 bytes."""
        image = self.latent_kb(stage.resolution) if stage.cached else self.dataset.image_kb
        lengths = self.true_lengths(stage)
        return image + (self.state_kb(sum(lengths) / len(lengths)) if stage.text_stored else 0)

    def latent_kb(self, resolution: int) -> float:
        """A sample of a set of latents, the means in half precision, 10^3 bytes."""
        return (2 * WHOLE_IMAGE * self.autoencoder.latent_values(resolution, resolution) + HEADERS) / 1e3

    def captions_at_once(self, stage: StageRecipe) -> int:
        """Captions as long as a stage's context that the text encoder takes at once."""
        return max(1, self.text_max_tokens // stage.context_length)

    def images_at_once(self, stage: StageRecipe) -> int:
        """Images of a stage that the autoencoder takes at once."""
        return max(1, self.autoencoder_max_pixels // stage.resolution**2)

    def with_samples(self, samples: Iterator[int]) -> "Recipe":
        """The same stages with other sample counts."""
        stages = tuple(replace(stage, samples=count) for stage, count in zip(self.stages, samples, strict=True))
        return replace(self, stages=stages)
