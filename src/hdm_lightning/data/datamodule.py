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
from hdm_lightning.data.crops import CropRules, require_least
from hdm_lightning.data.fit_position import FitPosition
from hdm_lightning.data.loader import StreamLoader, ValidationLoader, largest_sample_bytes
from hdm_lightning.data.rules import Alpha, StreamConfig, rules_from, sources_from
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import Tokenize
from hdm_lightning.data.shards_on_disk import notes, require_unchanged
from hdm_lightning.data.text_states import TextStates
from hdm_lightning.errors import UserError

VALIDATION = "validation"


class ShardDataModule(LightningDataModule):
    """Training and validation batches from WebDataset shards, for any Lightning trainer.

    Shards contain images, or latents that `hdm-shards encode` made of them, as recorded in the index; with latents,
    batches have `latent` instead of `image`.

    Training is one endless stream: micro-batch k of a rank contains its samples among the global positions from
    kG to (k+1)G after the start, G = batch_size × ranks; rank r of W has those with g = r (mod W). An epoch
    (`limit_train_batches`) begins where the last one ended, except with `overfit_batches`. The position is part of
    every checkpoint, counted in samples up to the last completed optimizer step, so `Trainer.fit(…, ckpt_path=…)`
    continues with the very next sample on any number of ranks and with any accumulation.

    The position follows the module's attribute `samples_trained` (int: samples up to the last optimizer step, over all
    ranks) if it has one, which manual optimization over several micro-batches requires; otherwise the trainer's own
    count of micro-batches.

    Args:
        train: a folder, shard, brace pattern or address; a list of them; or a list of
            `{"urls": …, "weight": …, "index": …}`.
        resolution: side of the square crop in pixels; also selects one set in a folder of several sets of latents.
        batch_size: samples per micro-batch on one rank.
        tokenizer: an object with `bind(context_length)`, such as `load_text_encoder(…).tokenizer`, or any picklable
            callable from a caption to (token ids, count without padding). None if captions are not used; they may
            then be missing.
        context_length: maximum number of tokens of a caption.
        text_lengths: what training captions are padded to: `padded` for the context length; `bucketed` for a few
            lengths (or your own list of them), with the samples of an optimizer step sorted into its micro-batches by
            length; `auto` for `padded` on a CPU, else `bucketed`. A step has the same samples and, up to rounding,
            the same gradients.
        validation: as `train`; None for the first samples of a fixed order of the training set. Validation uses center
            crops and each sample's first caption, in full.
        validation_samples: maximum number of validation samples over all ranks; 0 for no validation.
        validation_batch_size: on one rank; None for `batch_size`.
        validation_seed: chooses the validation samples, independently of `seed`, so runs with other seeds compare.
        num_workers: processes that prepare samples on each rank, rounded down so that each has its own lanes.
        seed, stage: together they determine the order, crops and captions.
        crop, captions: `CropRules` and `CaptionRules`, or mappings of their fields.
        lanes: number of places in the data that are read in parallel; world sizes that divide it read no byte twice.
        window: samples that are shuffled together within a lane (the shuffle spans lanes × window samples).
        max_bad_share: share of unusable samples among a rank's recent ones above which the run stops.
        bad_patience: samples before that share is first checked; 10 to 20 times as many count as recent.
        cache_dir, cache_gb: folder for copies of remote shards, and their maximum total size; None for no copies.
        memory_cache_gb: memory for decoded small images in each worker, for tiny sets.
        quarantine: file that gets one line of JSON per bad sample, or None.
        pin_memory: put batches in page-locked memory; None to do so if CUDA is available.
        consumed: samples of the stage consumed so far; a checkpoint's position or `skip_to` takes precedence.
        samples_per_step: samples per optimizer step over all ranks and accumulation steps, which share a bucket if
            `crop` has aspect-ratio buckets; None asks the trainer. Set it if accumulation or ranks may change.
        alpha: `white` composites transparency onto white; `mask` adds it as a fourth channel that weights the loss.
        text_states: folder that `hdm-shards encode-captions` made from these shards; batches then have the captions'
            `context`, and no caption is encoded. None encodes captions during training.

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
        self.validation_stream = replace(_for_validation(self._stream), sources=sources, seed=validation_seed)
        self.tokenize = _bound(tokenizer, context_length)
        self.text_lengths: TextLengths = "padded" if tokenizer is None else text_lengths
        padded_lengths(text_lengths, context_length, accelerated=True)  # only to validate them
        self.batch_size, self.samples_per_step = batch_size, samples_per_step
        self.validation_samples = validation_samples
        self.validation_batch_size = batch_size if validation_batch_size is None else validation_batch_size
        self.consumed = consumed
        for name in ("batch_size", "validation_batch_size", "samples_per_step"):
            require_least(f"data.{name}", getattr(self, name), 1)
        for name in ("validation_samples", "consumed"):
            require_least(f"data.{name}", getattr(self, name), 0)
        self.text_states_folder = text_states
        if text_states is not None and caption_rules.tags is not None:
            what = "tags are shuffled and dropped anew every time, so captions do not repeat and have no stored states"
            hint = "set data.text_states=null, or data.captions.tags=null"
            raise UserError(what, where="data.text_states", hint=hint)
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._plans: dict[StreamConfig, Plan] = {}
        self._restored: int | None = None
        self._skip: int | None = None
        self._fit: FitPosition | None = None

    @property
    def training_stream(self) -> StreamConfig:
        """The training stream; the block of its buckets is the number of samples per step."""
        crop = self._stream.crop
        if crop.buckets is None:
            return self._stream
        return replace(self._stream, crop=replace(crop, buckets=replace(crop.buckets, block=self._block())))

    @property
    def train_plan(self) -> Plan:
        """The order of the training samples; the first call reads the indices."""
        return self._plan(self.training_stream)

    @property
    def validation_plan(self) -> Plan:
        """The order of the validation samples; the first call reads the indices."""
        return self._plan(self.validation_stream)

    def prepare(self, *, unchanged: bool = False) -> None:
        """Read the indices of both sets now; with `unchanged`, also check that local shards are as indexed.

        Raises:
            UserError: an index is missing, a shard has changed, or no sample can be used.
        """
        if (plans := self._both()) and unchanged:
            require_unchanged(plans)
        self._text_states()

    def notes(self) -> list[str]:
        """Return warnings: local shards that have changed or are not indexed, and too many workers."""
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
        """Start the next fit (only that one) at this number of consumed samples, overriding its checkpoint."""
        require_least("data.position", position, 0)
        self._skip, self._fit = position, None

    def setup(self, stage: str) -> None:
        """Prepare a fit, which continues where the last fit of the same trainer ended; called by Lightning."""
        if stage == TrainerFn.FITTING.value and self._fit is not None:
            if self._fit.trainer is self.trainer:
                self._restored = self.position
            self._fit = None

    def train_dataloader(self) -> StreamLoader:
        """Return an endless loader; each iteration starts at the current position."""
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
        """Return a finite loader of the same length on every rank, or an empty list without validation samples."""
        if not self.validation_samples:
            return []
        rank, world = self.rank_and_world()
        return ValidationLoader(
            self.validation_stream,
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
        """Return the position, with the stage and fingerprint that show whether it still means the same samples."""
        return {"stage": self._stream.stage, "fingerprint": self.train_plan.fingerprint, "consumed": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's position for the fit that is starting.

        Raises:
            UserError: the checkpoint is from another stage, or shards, seed or rules have changed, so positions mean
                other samples.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # validation needs neither the position nor the training set
        stage = self._stream.stage
        if state_dict["stage"] != stage:
            raise UserError(
                f"the checkpoint was saved in stage '{state_dict['stage']}'; in stage '{stage}' its position would "
                "mean other samples",
                where=f"data of stage {stage}",
                hint="load its weights instead of resuming from it, or set the same stage for the data",
            )
        if state_dict["fingerprint"] != self.train_plan.fingerprint:
            raise UserError(
                "the shards, the seed or the rules that choose samples have changed since the checkpoint, so its "
                "position would mean other samples",
                where=f"data of stage {stage}",
                hint="restore the previous data and settings, or start the stage over",
            )
        self._restored, self._fit = state_dict.get("consumed"), None  # earlier versions saved no position

    def rank_and_world(self) -> tuple[int, int]:
        """Return rank and world size: from torch.distributed, else from the trainer, else 0 and 1."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return 0, 1

    def _begin_epoch(self) -> int:
        """Return where an iteration of the training loader starts; a fit's first one sets the origin of its counts."""
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
        """Return how many micro-batches are made from one sorted group of samples, all of one optimizer step."""
        if self.trainer is None:
            return 1
        accumulation, limit = self.trainer.accumulate_grad_batches, self.trainer.limit_train_batches
        changing = any(isinstance(each, GradientAccumulationScheduler) for each in self.trainer.callbacks)  # type: ignore[attr-defined]
        # Lightning steps at an epoch's end even after few micro-batches; a group cut there is not a run of positions.
        if changing or (isinstance(limit, int) and limit % accumulation):
            return 1
        return batches_sorted_together(
            accumulation, self.batch_size * largest_sample_bytes(self._stream, self.train_plan)
        )

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
            hint="pass `load_text_encoder(NAME).tokenizer`, a function from a caption to (token ids, count), or None",
        )
    return bound


def _no_tokens(caption: str) -> tuple[list[int], int]:
    """Stand in for a tokenizer when captions are not used."""
    return [0], 1
