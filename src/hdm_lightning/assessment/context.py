"""What the parts of an evaluation share: real pictures, networks, the agreement head; and one model's pictures.

Everything is made when a part first asks for it, once for all weights where it does not depend on them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdm_lightning.assessment.clip import ClipJudge
from hdm_lightning.assessment.pictures import (
    Captioned,
    PictureSet,
    collect,
    drawn_pictures,
    middle_crops,
    real_pictures,
)
from hdm_lightning.assessment.settings import EvaluationSettings
from hdm_lightning.data.config import StreamConfig
from hdm_lightning.data.plan import Plan
from hdm_lightning.data.reader import Reader
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.agreement_head import DualHead, HeadTraining, fit_dual_head
from hdm_lightning.evaluation.features import FeatureNetwork
from hdm_lightning.generation.image_files import to_uint8
from hdm_lightning.generation.image_writer import DrawJob
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.settings import SamplingSettings

DECODED = 512
FEWEST_HELDOUT = 64
FEWEST_REFERENCE = 2

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how many are done, of how many)."""


class RealData:
    """The real pictures that a model is compared with.

    Args:
        settings: counts.
        reference: held-out pictures with captions: prompts, and the other side of distances.
        train: the training set, to look for copies and to train the agreement head; None if it is not known.
        networks: feature networks, the first of which serves diversity, copies and agreement; none where they cannot
            be had.
        clip: a CLIP, or None.
        progress: told about pictures read.
        missing: why there are no feature networks, where there are none.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        reference: StreamConfig,
        train: StreamConfig | None,
        networks: Sequence[FeatureNetwork],
        clip: ClipJudge | None,
        progress: Progress,
        missing: UserError | None = None,
    ) -> None:
        self.settings, self.networks, self.clip, self.progress = settings, networks, clip, progress
        self._missing = missing
        self.reference_stream = middle_crops(reference)
        self.train_stream = None if train is None else middle_crops(train)
        self.kept: dict[str, dict[str, NDArray[np.float64]]] = {}
        """Values sample by sample of the weights measured so far, by measure and weights, for paired differences."""
        self._head: DualHead | None = None
        self._head_keys: set[str] = set()
        self._decoded: PictureSet | None = None

    @property
    def judges(self) -> list[FeatureNetwork]:
        """All networks that pictures are run through."""
        return [*self.networks, *([self.clip.network] if self.clip else [])]

    @cached_property
    def reference_plan(self) -> Plan:
        """The order of the reference set."""
        return Plan(self.reference_stream)

    @cached_property
    def train_plan(self) -> Plan | None:
        """The order of the training set."""
        return None if self.train_stream is None else Plan(self.train_stream)

    @property
    def reference_count(self) -> int:
        """Reference pictures that can be read, once they have been; before that, those that the indices promise."""
        if "reference" in vars(self):
            return len(self.reference)
        return min(self.settings.samples, self.reference_plan.samples)

    @cached_property
    def reference(self) -> PictureSet:
        """The reference pictures."""
        batches = real_pictures(self.reference_stream, self.reference_plan, self.settings.samples)
        pictures = self._collected(batches, "reading reference pictures", self.reference_count)
        require_reference(len(pictures))
        return pictures

    @cached_property
    def train(self) -> PictureSet:
        """The training pictures, features of the first network only."""
        assert self.train_stream is not None
        assert self.train_plan is not None
        count = min(self.settings.train_samples, self.train_plan.samples)
        batches = real_pictures(self.train_stream, self.train_plan, count)
        told = self._told(batches, "reading training pictures", count)
        return collect(told, self.networks[:1])

    @cached_property
    def first_record(self) -> dict[str, Any]:
        """The JSON record of the first reference picture; empty where there is none."""
        raw = Reader(self.reference_plan, self.reference_stream).read(self.reference_plan.locate(0))
        try:
            record = json.loads(raw.members.get("json", b"{}"))
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    def require_networks(self) -> None:
        """Raise what stood in the way of the feature networks, if anything did."""
        if self._missing is not None:
            raise self._missing

    def require_train(self, part: str) -> None:
        """Raise UserError if the training set is not known."""
        if self.train_stream is None:
            raise UserError(f"{part} needs the training set", where="--train-data", hint="give its folder of shards")

    def decoded(self, pipeline: HDMPipeline) -> PictureSet:
        """The first half of the reference pictures, at most `DECODED`, as the autoencoder gives them back."""
        if self._decoded is None:
            count = min(DECODED, self.reference_count // 2)
            batches = real_pictures(self.reference_stream, self.reference_plan, count)
            told = self._told(_through_autoencoder(pipeline, batches), "encoding and decoding", count)
            self._decoded = collect(told, self.networks)
        return self._decoded

    def head(self, text_features: Callable[[Sequence[str]], Tensor]) -> DualHead:
        """The agreement head, trained on training pictures without those kept for `heldout_rows`."""
        if self._head is None:
            kept = set(self.reference.keys[: max(FEWEST_HELDOUT, len(self.train) // 3)])
            rows = [row for row, key in enumerate(self.train.keys) if key not in kept]
            captions = [self.train.captions[row] for row in rows]
            self.progress("training the agreement head", 0, 1)
            features = self.train.features[self.networks[0].name][rows]
            training = HeadTraining(seed=self.settings.seed)
            self._head = fit_dual_head(features, text_features(captions), captions, training)
            self._head_keys = {self.train.keys[row] for row in rows}
            self.progress("training the agreement head", 1, 1)
        return self._head

    def heldout_rows(self) -> list[int]:
        """Reference pictures that the agreement head was not trained on."""
        return [row for row, key in enumerate(self.reference.keys) if key not in self._head_keys]

    def _collected(self, batches: Iterable[Captioned], what: str, count: int) -> PictureSet:
        return collect(self._told(batches, what, count), self.judges)

    def _told(self, batches: Iterable[Captioned], what: str, count: int) -> Iterator[Captioned]:
        return told(batches, self.progress, what, count)


@dataclass
class Context:
    """One set of weights under evaluation.

    Attributes:
        data: real pictures.
        settings: counts and seeds.
        pipeline: draws.
        weights: `ema` or `raw`.
        sampling: of square pictures; other sizes and cameras are derived from it.
    """

    data: RealData
    settings: EvaluationSettings
    pipeline: HDMPipeline
    weights: str
    sampling: SamplingSettings
    _text: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def drawn(self) -> PictureSet:
        """One picture for each reference caption, in rotation where there are fewer captions than samples."""
        captions = self.data.reference.captions
        prompts = [captions[number % len(captions)] for number in range(self.settings.samples)]
        jobs = [DrawJob(prompt, self.settings.seed + i, self.sampling) for i, prompt in enumerate(prompts)]
        return collect(self.draw(jobs, f"drawing {self.weights}"), self.data.judges)

    def draw(self, jobs: Sequence[DrawJob], what: str) -> Iterator[Captioned]:
        """Pictures of jobs, in order, with progress."""
        return told(drawn_pictures(self.pipeline, jobs), self.data.progress, what, len(jobs))

    def images(self, jobs: Sequence[DrawJob], what: str) -> Tensor:
        """Pictures (B,3,H,W) of jobs of one size."""
        return torch.cat([batch.images for batch in self.draw(jobs, f"{what} ({self.weights})")])

    def prompts(self, count: int) -> list[str]:
        """The first different captions of the reference set, at most `count`."""
        return list(dict.fromkeys(caption for caption in self.data.reference.captions if caption))[:count]

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Mean and last vector of the model's own text encoder, (N,2·width), on the CPU."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._text]
        for start in range(0, len(missing), 64):
            part = missing[start : start + 64]
            ids, counts = zip(*map(self.pipeline.caption_tokenizer, part), strict=True)
            lengths = torch.tensor(counts, device=self.pipeline.device)
            tokens = torch.tensor([row[: max(counts)] for row in ids], device=self.pipeline.device)
            context = self.pipeline.encoder.encode(tokens, lengths).float()
            last = context[torch.arange(len(part), device=context.device), lengths - 1]
            both = torch.cat([context.sum(1) / lengths[:, None], last], dim=1).cpu()
            self._text.update(zip(part, both, strict=True))
        return torch.stack([self._text[caption] for caption in captions])


def require_reference(count: int) -> None:
    """Raise UserError if there are fewer reference pictures than any part can do with."""
    if count < FEWEST_REFERENCE:
        raise UserError(
            f"there are {count} reference pictures that can be read, at least {FEWEST_REFERENCE} are needed",
            where="--data",
            hint="give a folder with more",
        )


def told(batches: Iterable[Captioned], progress: Progress, what: str, count: int) -> Iterator[Captioned]:
    """The batches, with progress told after each."""
    done = 0
    progress(what, 0, count)
    for batch in batches:
        yield batch
        done += len(batch.captions)
        progress(what, done, count)


@torch.no_grad()
def _through_autoencoder(pipeline: HDMPipeline, batches: Iterable[Captioned]) -> Iterator[Captioned]:
    for batch in batches:
        image = batch.images.to(pipeline.device).float() / 127.5 - 1.0
        decoded = pipeline.autoencoder.decode(pipeline.autoencoder.encode(image))
        yield batch._replace(images=to_uint8(decoded).cpu())
