"""What the parts of an evaluation share for one set of weights: drawn images, text features, and what parts need."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.image_sets import Captioned, ImageSet, collect, drawn_images, reported
from hdm_lightning.evaluation.real_data import RealData
from hdm_lightning.evaluation.request import EvaluationSettings
from hdm_lightning.evaluation.results import Found
from hdm_lightning.generation.jobs import DrawJob
from hdm_lightning.generation.pipeline import TextToImage
from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.metrics.agreement_head import FEWEST_PAIRS
from hdm_lightning.metrics.features import FeatureNetwork

_TEXT_BATCH = 64
_FEATURE_BATCH = 32


@dataclass
class Context:
    """One set of weights under evaluation.

    Attributes:
        real: images to compare with.
        settings: counts and seeds.
        pipeline: draws.
        weights: `ema` or `raw`.
        sampling: of square images; other sizes and cameras are derived from it.
    """

    real: RealData
    settings: EvaluationSettings
    pipeline: TextToImage
    weights: str
    sampling: SamplingSettings
    _text: dict[str, Tensor] = field(default_factory=dict)

    @property
    def network(self) -> FeatureNetwork:
        """The first feature network, which serves the parts that use one."""
        return self.real.networks[0]

    @cached_property
    def drawn(self) -> ImageSet:
        """One image for each reference caption, in rotation where there are fewer captions than samples."""
        captions = self.real.reference.captions
        prompts = [captions[number % len(captions)] for number in range(self.settings.samples)]
        return collect(self._draw(self._jobs(prompts, self.sampling), "drawing"), self.real.all_networks)

    def features(self, network: FeatureNetwork) -> tuple[Tensor, Tensor]:
        """Features of the reference images and of the drawn ones, on the network's device."""
        real, drawn = (images.features[network.name] for images in (self.real.reference, self.drawn))
        return real.to(network.device), drawn.to(network.device)

    def features_of(self, images: Tensor) -> Tensor:
        """Features (N,D) of images (N,3,H,W) by the first network, on the CPU."""
        return self.network.of_many(images.split(_FEATURE_BATCH)).cpu()

    def images(
        self, prompts: Sequence[str], sampling: SamplingSettings, what: str, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Images (B,3,H,W) of prompts under settings of their own.

        Args:
            prompts: B of them.
            sampling: of all images.
            what: for the progress.
            seeds: one each; None counts them from `settings.seed`.
        """
        return torch.cat([batch.images for batch in self._draw(self._jobs(prompts, sampling, seeds), what)])

    def prompts(self, count: int, part: str) -> list[str]:
        """The first different captions of the reference set, at most `count`.

        Raises:
            UserError: there are not two.
        """
        found = list(dict.fromkeys(caption for caption in self.real.reference.captions if caption))[:count]
        if len(found) < 2:
            raise UserError(f"{part} two different captions", where="--data", hint="give a folder with captions")
        return found

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Mean and last vector of the model's own text encoder, (N,2·width), on the CPU."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._text]
        for start in range(0, len(missing), _TEXT_BATCH):
            part = missing[start : start + _TEXT_BATCH]
            ids, counts = zip(*map(self.pipeline.tokenizer, part), strict=True)
            lengths = torch.tensor(counts, device=self.pipeline.device)
            tokens = torch.tensor([row[: max(counts)] for row in ids], device=self.pipeline.device)
            context = self.pipeline.text_encoder.encode(tokens, lengths).float()
            last = context[torch.arange(len(part), device=context.device), lengths - 1]
            both = torch.cat([context.sum(1) / lengths[:, None], last], dim=1).cpu()
            self._text.update(zip(part, both, strict=True))
        return torch.stack([self._text[caption] for caption in captions])

    def progress(self, what: str, done: int, total: int) -> None:
        """Report progress on these weights."""
        self.real.progress(f"{what} ({self.weights})", done, total)

    def _jobs(
        self, prompts: Sequence[str], sampling: SamplingSettings, seeds: Sequence[int] | None = None
    ) -> list[DrawJob]:
        counted = range(self.settings.seed, self.settings.seed + len(prompts)) if seeds is None else seeds
        return [DrawJob(prompt, seed, sampling) for prompt, seed in zip(prompts, counted, strict=True)]

    def _draw(self, jobs: Sequence[DrawJob], what: str) -> Iterator[Captioned]:
        return reported(drawn_images(self.pipeline, jobs), self.real.progress, f"{what} ({self.weights})", len(jobs))


Requirement = Callable[[Context], None]
"""Raises UserError where a part cannot be done, before anything is read or drawn."""


@dataclass(frozen=True)
class Measuring:
    """What measures a part for one set of weights, and what it needs."""

    run: Callable[[Context], Found]
    needs: tuple[Requirement, ...] = ()

    def require(self, context: Context) -> None:
        """Raise UserError where the part cannot be done."""
        for need in self.needs:
            need(context)

    def __call__(self, context: Context) -> Found:
        """Measure."""
        return self.run(context)


def needs(*requirements: Requirement) -> Callable[[Callable[[Context], Found]], Measuring]:
    """Decorate a function that measures a part with what it needs."""
    return lambda run: Measuring(run, requirements)


def feature_networks(context: Context) -> None:
    """A feature network can be had."""
    if context.real.missing is not None:
        raise context.real.missing


def training_images(context: Context, part: str, needed: int, hint: str) -> None:
    """The training set is known, and large enough."""
    if context.real.train_stream is None:
        raise UserError(f"{part} needs the training set", where="--train-data", hint="give its folder of shards")
    have = context.real.train_count
    if have < needed:
        what = f"{part} needs at least {needed} training images, there are {have}"
        raise UserError(what, where="--train-samples", hint=hint)


def agreement_head(context: Context) -> None:
    """The agreement head can be trained."""
    feature_networks(context)
    needed = 2 * FEWEST_PAIRS
    hint = f"give --train-samples {needed} and a training set with as many, or --clip NAME"
    training_images(context, "the agreement head", needed, hint)


def holds(requirement: Requirement, context: Context) -> bool:
    """Whether a requirement is met."""
    try:
        requirement(context)
    except UserError:
        return False
    return True
