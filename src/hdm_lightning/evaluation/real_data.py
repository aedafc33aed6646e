"""The real images that a model is compared with, made when a part first asks for them, once for all weights."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdm_lightning.data.config import StreamConfig
from hdm_lightning.data.plan import Plan
from hdm_lightning.data.reader import Reader
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.clip import Clip
from hdm_lightning.evaluation.image_sets import ImageSet, Progress, collect, real_images, reported
from hdm_lightning.evaluation.request import EvaluationSettings
from hdm_lightning.generation.pipeline import TextToImage, to_uint8
from hdm_lightning.metrics.agreement_head import DualHead, fit_dual_head
from hdm_lightning.metrics.features import FeatureNetwork

DECODED = 512
FEWEST_HELDOUT = 64
FEWEST_REFERENCE = 2


@dataclass
class RealData:
    """The real images that a model is compared with, and what is made of them alone.

    Attributes:
        settings: counts.
        reference_stream: held-out images with captions: prompts, and the other side of distances.
        train_stream: the training set, to look for copies and to train the agreement head; None if it is not known.
        networks: feature networks, the first of which serves diversity, copies and agreement; none where they cannot
            be had.
        clip: a CLIP, or None.
        progress: called for images read.
        missing: why there are no feature networks, where there are none.
        kept: values sample by sample of the weights measured so far, by measure and weights, for paired differences.
    """

    settings: EvaluationSettings
    reference_stream: StreamConfig
    train_stream: StreamConfig | None
    networks: Sequence[FeatureNetwork]
    clip: Clip | None
    progress: Progress
    missing: UserError | None = None
    kept: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    _head: tuple[DualHead, set[str]] | None = None
    _decoded: ImageSet | None = None

    @property
    def all_networks(self) -> list[FeatureNetwork]:
        """All networks that images are run through."""
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
        """Reference images that can be read, once they have been; before that, those that the indices promise."""
        if "reference" in vars(self):
            return len(self.reference)
        return min(self.settings.samples, self.reference_plan.samples)

    @property
    def train_count(self) -> int:
        """Training images that are looked at; 0 where the training set is not known."""
        return 0 if self.train_plan is None else min(self.settings.train_samples, self.train_plan.samples)

    @cached_property
    def reference(self) -> ImageSet:
        """The reference images."""
        count, batches = (
            self.reference_count,
            real_images(self.reference_stream, self.reference_plan, self.settings.samples),
        )
        images = collect(reported(batches, self.progress, "reading reference images", count), self.all_networks)
        require_reference(len(images))
        return images

    @cached_property
    def train(self) -> ImageSet:
        """The training images, features of the first network only."""
        assert self.train_stream is not None
        assert self.train_plan is not None
        count, batches = self.train_count, real_images(self.train_stream, self.train_plan, self.train_count)
        return collect(reported(batches, self.progress, "reading training images", count), self.networks[:1])

    @cached_property
    def first_record(self) -> dict[str, Any]:
        """The JSON record of the first reference image; empty where there is none."""
        raw = Reader(self.reference_plan, self.reference_stream).read(self.reference_plan.locate(0))
        try:
            record = json.loads(raw.members.get("json", b"{}"))
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    def require_indices(self, *, train_named: bool) -> None:
        """Read the indices of both sets now: what is missing would end the evaluation after hours.

        A training set that a run names is done without where it is not on this machine.

        Raises:
            UserError: too few reference images, or no training set where `train_named`.
        """
        require_reference(self.reference_count)
        try:
            _ = self.train_plan
        except UserError:
            if train_named:
                raise
            self.train_stream = None

    @torch.no_grad()
    def decoded(self, pipeline: TextToImage) -> ImageSet:
        """The first half of the reference images, at most `DECODED`, encoded and decoded by the autoencoder."""
        if self._decoded is None:
            count = min(DECODED, self.reference_count // 2)
            batches = (
                batch._replace(images=_reconstructed(pipeline, batch.images))
                for batch in real_images(self.reference_stream, self.reference_plan, count)
            )
            self._decoded = collect(reported(batches, self.progress, "encoding and decoding", count), self.networks)
        return self._decoded

    def head(self, text_features: Callable[[Sequence[str]], Tensor]) -> DualHead:
        """The agreement head, trained on training images without those kept for `heldout_rows`."""
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
        """Reference images that the agreement head was not trained on."""
        seen = self._head[1] if self._head else ()
        return [row for row, key in enumerate(self.reference.keys) if key not in seen]


def require_reference(count: int) -> None:
    """Raise UserError if there are fewer reference images than any part can do with."""
    if count < FEWEST_REFERENCE:
        what = f"there are {count} reference images that can be read, at least {FEWEST_REFERENCE} are needed"
        raise UserError(what, where="--data", hint="give a folder with more")


def _reconstructed(pipeline: TextToImage, images: Tensor) -> Tensor:
    image = images.to(pipeline.device).float() / 127.5 - 1.0
    return to_uint8(pipeline.autoencoder.decode(pipeline.autoencoder.encode(image))).cpu()
