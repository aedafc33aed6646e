"""Shards as a LightningDataModule: an endless training stream that knows its position, and a fixed validation set."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn

from hdm_lightning.data import worker_processes
from hdm_lightning.data.caption_lengths import TextLengths, batches_sorted_together, padded_lengths
from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.crops import CropRules
from hdm_lightning.data.fit_position import FitPosition
from hdm_lightning.data.loader import StreamLoader, ValidationLoader
from hdm_lightning.data.rules import Alpha, StreamConfig, rules_from, sources_from
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import Tokenize
from hdm_lightning.data.shards_on_disk import notes, require_unchanged
from hdm_lightning.data.text_states import TextStates
from hdm_lightning.errors import UserError

VALIDATION = "validation"


class ShardDataModule(LightningDataModule):
    """Training and validation batches from WebDataset shards, for any Lightning trainer.

    Shards hold images, or latents that `hdm-shards encode` made of them, which the index tells; then batches have
    `latent` in the place of `image`.

    Training is one endless stream: micro-batch k of a rank holds its samples among the global positions from
    kG to (k+1)G after the start, G = batch_size × ranks; rank r of W has those with g = r (mod W). An epoch
    (`limit_train_batches`) begins where the last one ended, except with `overfit_batches`. The position is part of
    every checkpoint, counted in samples up to the last completed optimizer step, so that `Trainer.fit(…, ckpt_path=…)`
    continues with the very next sample on any number of ranks and with any accumulation.

    The position follows the module's attribute `samples_trained` (int: samples up to the last optimizer step, over all
    ranks) where it has one, as it must with manual optimization over several micro-batches; otherwise the trainer's
    own count of micro-batches.

    Args:
        train: a folder, shard, brace pattern or address; a list of them; or a list of
            `{"urls": …, "weight": …, "index": …}`.
        resolution: side of the square crop in pixels; of a folder of several sets of latents it picks the one.
        batch_size: samples of a micro-batch on one rank.
        tokenizer: something with `bind(context_length)`, as `load_text_encoder(…).tokenizer` has it, or any picklable
            callable from a caption to (token ids, how many of them count). None where captions play no part; they
            may then be missing.
        context_length: token places of a caption.
        text_lengths: what training captions are padded to: `padded` for the context length; `bucketed` for few lengths
            (or a list of one's own), the samples of an optimizer step going to its micro-batches by length; `auto` for
            the former on a CPU and the latter elsewhere. A step has the same samples and, but for rounding, gradients.
        validation: as `train`; None for the first samples of a fixed order of the training set. Its crops are centred
            and its captions the first ones, whole.
        validation_samples: samples of the validation set over all ranks, at most; 0 for no validation.
        validation_batch_size: on one rank; None for `batch_size`.
        validation_seed: chooses the validation samples, apart from `seed`, so that runs of other seeds compare.
        num_workers: processes that prepare samples on each rank, rounded down so that each has lanes of its own.
        seed, stage: what the order, crops and captions depend on.
        crop, captions: `CropRules` and `CaptionRules`, or mappings of their fields.
        lanes: places of the data that are read side by side; world sizes that divide it read no byte twice.
        window: samples that are shuffled together within a lane (the shuffle spans lanes × window samples).
        max_bad_share: share of unusable samples, of the latest ones of a rank, at which the run stops.
        bad_patience: samples to see before that share is judged; 10 to 20 times as many count as the latest.
        cache_dir, cache_gb: where copies of remote shards are kept, and how much of them; None for no copies.
        memory_cache_gb: decoded small images that each worker keeps, for tiny sets.
        quarantine: file that gets one line of JSON a bad sample, or None.
        pin_memory: lay batches in page-locked memory; None where CUDA is there.
        consumed: samples of the stage consumed before; a checkpoint's position or `skip_to` wins.
        samples_per_step: samples of an optimizer step over all ranks and its accumulation, which share a bucket where
            `crop` has aspect-ratio buckets; None asks the trainer. Give it where accumulation or ranks may change.
        alpha: transparency is laid on white, or a `mask`: the image's fourth channel, by which the loss is weighed.
        text_states: folder that `hdm-shards encode-captions` made of these shards; batches then have the captions'
            `context`, and nothing is encoded. None encodes captions as they come.

    Raises:
        UserError: a value is wrong; no shard or index is read before the first plan or loader.
    """

    def __init__(
        self,
        train: Any,
        *,
        resolution: int,
        batch_size: int,
        tokenizer: Any = None,
        context_length: int = 256,
        text_lengths: TextLengths = "auto",
        validation: Any = None,
        validation_samples: int = 256,
        validation_batch_size: int | None = None,
        validation_seed: int = 0,
        num_workers: int = 4,
        seed: int = 0,
        stage: str = "train",
        crop: CropRules | Mapping[str, Any] | None = None,
        captions: CaptionRules | Mapping[str, Any] | None = None,
        lanes: int = 96,
        window: int = 32,
        max_bad_share: float = 0.05,
        bad_patience: int = 1000,
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
        memory_cache_gb: float = 0.0,
        quarantine: str | None = None,
        pin_memory: bool | None = None,
        consumed: int = 0,
        samples_per_step: int | None = None,
        alpha: Alpha = "white",
        text_states: str | None = None,
    ) -> None:
        super().__init__()
        caption_rules = rules_from(captions, CaptionRules, "data.captions")
        self._stream = StreamConfig(
            sources=sources_from(train, "data.train"),
            resolution=resolution,
            context_length=context_length,
            seed=seed,
            stage=stage,
            crop=rules_from(crop, CropRules, "data.crop"),
            captions=caption_rules if tokenizer is not None else replace(caption_rules, allow_missing=True),
            lanes=lanes,
            window=window,
            workers=num_workers,
            max_bad_share=max_bad_share,
            bad_patience=bad_patience,
            quarantine=quarantine,
            cache_dir=cache_dir,
            cache_gb=cache_gb,
            memory_cache_gb=memory_cache_gb,
            alpha=alpha,
        )
        sources = self._stream.sources if validation is None else sources_from(validation, "data.validation")
        self._validation = replace(_for_validation(self._stream), sources=sources, seed=validation_seed)
        self.tokenize = _bound(tokenizer, context_length)
        self.text_lengths: TextLengths = "padded" if tokenizer is None else text_lengths
        padded_lengths(text_lengths, context_length, accelerated=True)  # raises what is wrong with them
        self.batch_size, self.samples_per_step = batch_size, samples_per_step
        self.validation_samples = validation_samples
        self.validation_batch_size = batch_size if validation_batch_size is None else validation_batch_size
        self.consumed = consumed
        for name in ("batch_size", "validation_batch_size", "samples_per_step"):
            _require(name, getattr(self, name), 1)
        for name in ("validation_samples", "consumed"):
            _require(name, getattr(self, name), 0)
        self.text_states_folder = text_states
        if text_states is not None and caption_rules.tags is not None:
            what = "tags are shuffled and dropped at every sight, so that no caption comes twice"
            hint = "set data.text_states=null, or data.captions.tags=null"
            raise UserError(what, where="data.text_states", hint=hint)
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._plans: dict[StreamConfig, Plan] = {}
        self._restored: int | None = None
        self._skip: int | None = None
        self._fit: FitPosition | None = None

    @property
    def training_stream(self) -> StreamConfig:
        """The training stream; the block of its buckets is what a step takes."""
        crop = self._stream.crop
        return self._stream if crop.buckets is None else replace(self._stream, crop=crop.with_block(self._block()))

    @property
    def validation_stream(self) -> StreamConfig:
        """The validation stream."""
        return self._validation

    @property
    def train_plan(self) -> Plan:
        """The order of the training samples; the first call reads the indices."""
        return self._plan(self.training_stream)

    @property
    def validation_plan(self) -> Plan:
        """The order of the validation samples; the first call reads the indices."""
        return self._plan(self._validation)

    def prepare(self, *, unchanged: bool = False) -> None:
        """Read the indices of both sets now; with `unchanged`, look whether local shards are what was indexed.

        Raises UserError: an index is missing, a shard is another, or no sample may be used; naming the folder or key.
        """
        if (plans := self._both()) and unchanged:
            require_unchanged(plans)
        self._text_states()

    def notes(self) -> list[str]:
        """A line for local shards that have changed or were not indexed, of each kind, and for too many workers."""
        crowding = worker_processes.crowding(
            self._stream.workers, worker_processes.ranks_here(self.rank_and_world()[1])
        )
        return [*notes(self._both()), *([crowding] if crowding else [])]

    @property
    def position(self) -> int:
        """Samples of the stage consumed up to the last completed optimizer step, over all ranks."""
        if self._fit is not None:
            return self._fit.position(self.batch_size * self.rank_and_world()[1])
        return self._first()

    def skip_to(self, position: int) -> None:
        """Begin the next fit at this position, whatever its checkpoint says; used once.

        Args:
            position: samples of the stage that count as consumed, at least 0.
        """
        _require("position", position, 0)
        self._skip, self._fit = position, None

    def setup(self, stage: str) -> None:
        """Lightning begins to fit or validate: a fit continues where the same trainer's last fit ended."""
        if stage == TrainerFn.FITTING.value and self._fit is not None:
            if self._fit.trainer is self.trainer:
                self._restored = self.position
            self._fit = None

    def train_dataloader(self) -> StreamLoader:
        """An endless loader; each iteration begins at the position of that moment."""
        rank, world = self.rank_and_world()
        lengths = self._padded_lengths()
        return StreamLoader(
            self.training_stream,
            self.train_plan,
            self.tokenize,
            batch_size=self.batch_size,
            rank=rank,
            world=world,
            start=self._begin_epoch,
            pin_memory=self.pin_memory,
            lengths=lengths,
            together=self._sorted_together() if len(lengths) > 1 else 1,
            text_states=self._text_states(),
            validated=self.validation_samples > 0,
        )

    def val_dataloader(self) -> ValidationLoader | list[ValidationLoader]:
        """A finite loader, the same length on every rank; an empty list where there is nothing to validate on."""
        if not self.validation_samples:
            return []
        rank, world = self.rank_and_world()
        return ValidationLoader(
            self._validation,
            self.validation_plan,
            self.tokenize,
            samples=self.validation_samples,
            batch_size=self.validation_batch_size,
            rank=rank,
            world=world,
            pin_memory=self.pin_memory,
            text_states=self._text_states(),
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the position, and what shows whether it still means the same samples."""
        return {
            "stage": self._stream.stage,
            "fingerprint": self.train_plan.fingerprint,
            "consumed": self.position,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position for the fit that begins.

        Raises:
            UserError: the checkpoint is of another stage, or shards, seed or rules have changed, so that positions
                mean other samples.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # validation needs no position, nor the training set
        stage = self._stream.stage
        if state_dict["stage"] != stage:
            raise UserError(
                f"the checkpoint was saved in stage '{state_dict['stage']}', in whose order its position means other "
                f"samples than in stage '{stage}'",
                where=f"data of stage {stage}",
                hint="load its weights instead of resuming from it, or give the data the same stage",
            )
        if state_dict["fingerprint"] != self.train_plan.fingerprint:
            raise UserError(
                "the shards, the seed or the rules that choose samples have changed since the checkpoint, so that its "
                "position would mean other samples",
                where=f"data of stage {stage}",
                hint="restore the former data and settings, or start the stage anew",
            )
        self._restored, self._fit = state_dict.get("consumed"), None  # earlier versions kept no position

    def rank_and_world(self) -> tuple[int, int]:
        """Rank and number of ranks: of torch.distributed, else of the trainer, else 0 and 1."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return 0, 1

    def _begin_epoch(self) -> int:
        """Where an iteration of the training loader begins; the first one of a fit fixes what is counted from."""
        if self._fit is None:
            if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
                return self._first()
            self._fit = FitPosition.of(self.trainer, self._first())
            self._skip = self._restored = None
        return self.position

    def _text_states(self) -> TextStates | None:
        if self.text_states_folder is None:
            return None
        states = TextStates(self.text_states_folder)
        states.check(self._stream.context_length)
        return states

    def _first(self) -> int:
        return next(each for each in (self._skip, self._restored, self.consumed) if each is not None)

    def _padded_lengths(self) -> tuple[int, ...]:
        device = None if self.trainer is None else self.trainer.strategy.root_device
        accelerated = device is not None and device.type != "cpu"
        return padded_lengths(self.text_lengths, self._stream.context_length, accelerated=accelerated)

    def _sorted_together(self) -> int:
        """Micro-batches that are made of one group of samples: of one optimizer step, in any case."""
        if self.trainer is None:
            return 1
        accumulation, limit = self.trainer.accumulate_grad_batches, self.trainer.limit_train_batches
        changing = any(isinstance(each, GradientAccumulationScheduler) for each in self.trainer.callbacks)  # type: ignore[attr-defined]
        # Lightning steps at the end of an epoch, however few micro-batches there are, and the position is counted on.
        if changing or (isinstance(limit, int) and limit % accumulation):
            return 1
        return batches_sorted_together(accumulation, 3 * self.batch_size * self._stream.resolution**2)

    def _block(self) -> int:
        if self.samples_per_step is not None:
            return self.samples_per_step
        accumulation = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        return self.batch_size * self.rank_and_world()[1] * accumulation

    def _both(self) -> list[Plan]:
        return [self.train_plan, *([self.validation_plan] if self.validation_samples else [])]

    def _plan(self, config: StreamConfig) -> Plan:
        if config not in self._plans:
            plan = Plan(config)
            if plan.latents is not None:
                plan.latents.check(config.crop, config.resolution)
            self._plans[config] = plan
        return self._plans[config]


def _for_validation(config: StreamConfig) -> StreamConfig:
    crop = replace(config.crop, centre=True, flip=False, buckets=None)
    return replace(config, stage=VALIDATION, crop=crop, captions=replace(config.captions, drop=0.0))


def _bound(tokenizer: Any, context_length: int) -> Tokenize:
    if tokenizer is None:
        return _no_tokens
    bind = getattr(tokenizer, "bind", None)
    bound: Tokenize = tokenizer if bind is None else bind(context_length)
    if not callable(bound):
        raise UserError(
            f"{tokenizer!r} cannot be called",
            where="data.tokenizer",
            hint="give `load_text_encoder(NAME).tokenizer`, a function from a caption to (token ids, count), or None",
        )
    return bound


def _no_tokens(caption: str) -> tuple[list[int], int]:
    """Stand in for a tokenizer where captions play no part."""
    return [0], 1


def _require(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"is {value}", where=f"data.{name}", hint=f"give {least} or more")
