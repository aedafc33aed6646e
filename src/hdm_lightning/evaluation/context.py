"""What the parts of an evaluation share: real images, one model's generated images, text features, and requirements.

Everything is made when a part first asks for it: real images once, generated ones for each set of weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hdm_lightning.data.reader import Reader
from hdm_lightning.data.rules import StreamConfig
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.clip import Clip
from hdm_lightning.evaluation.findings import Found
from hdm_lightning.evaluation.image_sets import (
    Captioned,
    ImageSet,
    Progress,
    collect,
    drawn_images,
    real_images,
    reported,
)
from hdm_lightning.evaluation.request import EvaluationSettings
from hdm_lightning.generation.guided_branches import encode_texts
from hdm_lightning.generation.image_files import to_uint8
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.json_files import parse_object
from hdm_lightning.metrics.agreement_head import FEWEST_PAIRS, DualHead, fit_dual_head
from hdm_lightning.metrics.features import FeatureNetwork

FEWEST_HELDOUT = 64
FEWEST_REFERENCE = 2
_TEXT_BATCH = 64
_FEATURE_BATCH = 32


@dataclass
class RealData:
    """The real images that a model is compared with, and results that depend on them alone.

    Attributes:
        settings: counts.
        reference_stream: held-out images with captions: prompts, and the other side of distances.
        train_stream: the training set, to look for copies and to train the agreement head; None if unknown.
        networks: feature networks, the first of which serves diversity, copies and agreement; empty if they are not
            available.
        clip: a CLIP, or None.
        encoders: a pipeline with the encoders that all weights share.
        progress: called as images are read.
        missing: why there are no feature networks, if there are none.
        done: results that all weights share, by name.
    """

    settings: EvaluationSettings
    reference_stream: StreamConfig
    train_stream: StreamConfig | None
    networks: Sequence[FeatureNetwork]
    clip: Clip | None
    encoders: HDMPipeline
    progress: Progress
    missing: UserError | None = None
    done: dict[str, Any] = field(default_factory=dict)
    _head: tuple[DualHead, set[str]] | None = None

    @property
    def all_networks(self) -> list[FeatureNetwork]:
        """All networks that process the images."""
        return [*self.networks, *([self.clip.network] if self.clip else [])]

    @cached_property
    def reference_plan(self) -> Plan:
        """The order of the reference set."""
        plan = Plan(self.reference_stream)
        plan.require_images("--data")
        return plan

    @cached_property
    def train_plan(self) -> Plan | None:
        """The order of the training set."""
        if self.train_stream is None:
            return None
        plan = Plan(self.train_stream)
        plan.require_images("--train-data")
        return plan

    @property
    def reference_count(self) -> int:
        """Number of readable reference images once they are read; before that, the number in the indices."""
        if "reference" in vars(self):
            return len(self.reference)
        return min(self.settings.samples, self.reference_plan.samples)

    @property
    def train_count(self) -> int:
        """Number of training images to use; 0 if the training set is unknown."""
        return 0 if self.train_plan is None else min(self.settings.train_samples, self.train_plan.samples)

    @cached_property
    def reference(self) -> ImageSet:
        """The reference images."""
        batches = real_images(self.reference_stream, self.reference_plan, self.settings.samples)
        told = reported(batches, self.progress, "reading reference images", self.reference_count)
        images = collect(told, self.all_networks)
        require_reference(len(images))
        return images

    @cached_property
    def decoded(self) -> ImageSet:
        """The reference images, encoded and decoded: the best that a model with this autoencoder can do."""
        batches = real_images(self.reference_stream, self.reference_plan, self.settings.samples)
        return self._decoded(batches, self.networks, "encoding and decoding", self.reference_count)

    @cached_property
    def train(self) -> ImageSet:
        """The training images, encoded and decoded like generated ones; features of the first network only."""
        assert self.train_stream is not None
        assert self.train_plan is not None
        batches = real_images(self.train_stream, self.train_plan, self.train_count)
        return self._decoded(batches, self.networks[:1], "encoding and decoding training images", self.train_count)

    def planted(self, count: int, noise: float, shift_px: int) -> ImageSet:
        """Make copies of the first training images, as a model that memorized them might generate them.

        Args:
            count: how many.
            noise: standard deviation of the noise added to the latent, whose own is 1.
            shift_px: how far the image is moved, right and down; its edge is repeated.
        """
        assert self.train_stream is not None
        assert self.train_plan is not None
        batches = real_images(self.train_stream, self.train_plan, count)
        moved = (batch._replace(images=_moved(batch.images, shift_px)) for batch in batches)
        return self._decoded(moved, self.networks[:1], "planting copies", count, noise)

    def once(self, key: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return what `make` returns for these arguments, computed for the first set of weights and kept for others."""
        if key not in self.done:
            self.done[key] = make(*arguments, **options)
        return self.done[key]

    def _decoded(
        self,
        batches: Iterator[Captioned],
        networks: Sequence[FeatureNetwork],
        what: str,
        count: int,
        noise: float = 0.0,
    ) -> ImageSet:
        random = torch.Generator().manual_seed(self.settings.seed)
        given = (batch._replace(images=_reconstructed(self.encoders, batch.images, noise, random)) for batch in batches)
        return collect(reported(given, self.progress, what, count), networks)

    @cached_property
    def first_record(self) -> dict[str, Any]:
        """The JSON record of the first reference image; empty if there is none."""
        raw = Reader(self.reference_plan, self.reference_stream).read(self.reference_plan.locate(0))
        try:
            return parse_object(raw.members.get("json", b"{}"))
        except ValueError:
            return {}

    def require_indices(self, *, train_named: bool) -> None:
        """Read the indices of both sets now, as a missing one would otherwise end the evaluation after hours.

        A training set that only the run names is dropped if it is not on this machine; one the user names must exist.
        """
        require_reference(self.reference_count)
        try:
            _ = self.train_plan
        except UserError:
            if train_named:
                raise
            self.train_stream = None

    def head(self, text_features: Callable[[Sequence[str]], Tensor]) -> DualHead:
        """Return the agreement head, trained on decoded training images without those kept for `heldout_rows`."""
        if self._head is None:
            kept = set(self.reference.keys[: max(FEWEST_HELDOUT, len(self.train) // 3)])
            rows = [row for row, key in enumerate(self.train.keys) if key not in kept]
            captions = [self.train.captions[row] for row in rows]
            self.progress("training the agreement head", 0, 1)
            features = self.train.features[self.networks[0].name][rows]
            head = fit_dual_head(features, text_features(captions), captions, seed=self.settings.seed)
            self._head = head, {self.train.keys[row] for row in rows}
            self.progress("training the agreement head", 1, 1)
        return self._head[0]

    def heldout_rows(self) -> list[int]:
        """Return the rows of the reference images that the agreement head was not trained on."""
        seen = self._head[1] if self._head else ()
        return [row for row, key in enumerate(self.reference.keys) if key not in seen]


def require_reference(count: int) -> None:
    """Raise UserError if there are fewer reference images than every part needs."""
    if count < FEWEST_REFERENCE:
        what = f"found {count} readable reference images, at least {FEWEST_REFERENCE} are needed"
        raise UserError(what, where="--data", hint="pass a folder with more")


@torch.no_grad()
def _reconstructed(pipeline: HDMPipeline, images: Tensor, noise: float, random: torch.Generator) -> Tensor:
    latents = pipeline.autoencoder.encode(images.to(pipeline.device).float() / 127.5 - 1.0)
    if noise:
        latents = latents + noise * torch.randn(latents.shape, generator=random).to(latents)
    return to_uint8(pipeline.autoencoder.decode(latents)).cpu()


def _moved(images: Tensor, shift_px: int) -> Tensor:
    if not shift_px:
        return images
    padded = torch.nn.functional.pad(images.float(), (shift_px, 0, shift_px, 0), mode="replicate")
    return padded[..., : images.shape[-2], : images.shape[-1]].to(images.dtype)


@dataclass
class Context:
    """One set of weights under evaluation.

    Attributes:
        real: images to compare with.
        pipeline: generates the images.
        weights: `ema` or `raw`.
        sampling: for square images; other sizes and cameras are derived from it.
    """

    real: RealData
    pipeline: HDMPipeline
    weights: str
    sampling: SamplingSettings
    _text: dict[str, Tensor] = field(default_factory=dict)

    @property
    def settings(self) -> EvaluationSettings:
        """Counts and seeds."""
        return self.real.settings

    @property
    def network(self) -> FeatureNetwork:
        """The first feature network, which serves the parts that use only one."""
        return self.real.networks[0]

    @cached_property
    def drawn(self) -> ImageSet:
        """One image for each reference caption, in rotation if there are fewer captions than samples."""
        captions = self.real.reference.captions
        prompts = [captions[number % len(captions)] for number in range(self.settings.samples)]
        return collect(self._draw(prompts, self.sampling, "generating"), self.real.all_networks)

    def features(self, network: FeatureNetwork) -> tuple[Tensor, Tensor]:
        """Return features of the reference images and of the generated ones, on the network's device."""
        real, drawn = (images.features[network.name] for images in (self.real.reference, self.drawn))
        return real.to(network.device), drawn.to(network.device)

    def features_of(self, images: Tensor) -> Tensor:
        """Return features (N,D) of images (N,3,H,W) by the first network, on the CPU."""
        return torch.cat([self.network(part) for part in images.split(_FEATURE_BATCH)]).cpu()

    def images(
        self, prompts: Sequence[str], sampling: SamplingSettings, what: str, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Generate images (B,3,H,W) of B prompts with these settings; seeds count from `settings.seed` by default."""
        return torch.cat([batch.images for batch in self._draw(prompts, sampling, what, seeds)])

    def prompts(self, count: int, part: str) -> list[str]:
        """Return the first `count` different captions of the reference set. Raises UserError: there are not two."""
        found = list(dict.fromkeys(caption for caption in self.real.reference.captions if caption))[:count]
        if len(found) < 2:
            raise UserError(f"{part} two different captions", where="--data", hint="pass a folder with captions")
        return found

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Return mean and last vector of the model's own text encoder, (N,2·width), on the CPU."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._text]
        for start in range(0, len(missing), _TEXT_BATCH):
            part = missing[start : start + _TEXT_BATCH]
            text = encode_texts(part, self.pipeline.encoder, self.pipeline.caption_tokenizer, self.pipeline.device)
            context, lengths = text.context, text.counts
            last = context[torch.arange(len(part), device=context.device), lengths - 1]
            both = torch.cat([context.sum(1) / lengths[:, None], last], dim=1).cpu()
            self._text.update(zip(part, both, strict=True))
        return torch.stack([self._text[caption] for caption in captions])

    def progress(self, what: str, done: int, total: int) -> None:
        """Report progress for these weights."""
        self.real.progress(f"{what} ({self.weights})", done, total)

    def _draw(
        self, prompts: Sequence[str], sampling: SamplingSettings, what: str, seeds: Sequence[int] | None = None
    ) -> Iterator[Captioned]:
        counted = range(self.settings.seed, self.settings.seed + len(prompts)) if seeds is None else seeds
        return reported(drawn_images(self.pipeline, prompts, counted, sampling), self.progress, what, len(prompts))


Requirement = Callable[[Context], None]
"""Raises UserError if a part cannot be measured, before anything is read or generated."""


@dataclass(frozen=True)
class Measuring:
    """The function that measures a part for one set of weights, and the part's requirements."""

    run: Callable[[Context], Found]
    needs: tuple[Requirement, ...] = ()

    def require(self, context: Context) -> None:
        """Raise UserError if the part cannot be measured."""
        for need in self.needs:
            need(context)


def needs(*requirements: Requirement) -> Callable[[Callable[[Context], Found]], Measuring]:
    """Decorate a function that measures a part with the part's requirements."""
    return lambda run: Measuring(run, requirements)


def feature_networks(context: Context) -> None:
    """Require a feature network."""
    if context.real.missing is not None:
        raise context.real.missing


def training_images(context: Context, part: str, needed: int, hint: str) -> None:
    """Require a known training set that is large enough."""
    if context.real.train_stream is None:
        raise UserError(f"{part} needs the training set", where="--train-data", hint="pass its folder of shards")
    have = context.real.train_count
    if have < needed:
        what = f"{part} needs at least {needed} training images, there are {have}"
        raise UserError(what, where="--train-samples", hint=hint)


def agreement_head(context: Context) -> None:
    """Require what the agreement head is trained on."""
    feature_networks(context)
    needed = 2 * FEWEST_PAIRS
    hint = f"pass --train-samples {needed} and a training set with as many, or --clip NAME"
    training_images(context, "the agreement head", needed, hint)


def holds(requirement: Requirement, context: Context) -> bool:
    """Return whether a requirement is met."""
    try:
        requirement(context)
    except UserError:
        return False
    return True
