"""Shards as a LightningDataModule: an endless training loader and a finite validation loader."""

from dataclasses import replace
from functools import cached_property

import torch
from lightning import LightningDataModule

from hdm_lightning.data.config import StreamConfig
from hdm_lightning.data.loader import StreamLoader, ValidationLoader
from hdm_lightning.data.plan import Plan
from hdm_lightning.data.preparation import Tokenize
from hdm_lightning.errors import UserError


class ShardDataModule(LightningDataModule):
    """Training and validation batches from WebDataset shards.

    Global batch k of G samples (batch_size × ranks × accumulation) covers the global positions from
    `consumed` + kG to `consumed` + (k+1)G; rank r of W has those with g = r (mod W), in rising order. Give `consumed`
    the samples of this stage that were trained on before, and the stream goes on as if it had never stopped.

    Args:
        train: the training stream.
        validation: the validation stream, or None. Its crops are centred and its captions left whole.
        tokenize: caption to (token numbers, true count).
        batch_size: samples a rank and micro-step.
        consumed: global samples already consumed in this stage.
        validation_samples: how many samples validate, over all ranks.
        validation_batch_size: None for `batch_size`.
        pin_memory: lay batches in page-locked memory; None where CUDA is there.
    """

    def __init__(
        self,
        train: StreamConfig,
        validation: StreamConfig | None,
        *,
        tokenize: Tokenize,
        batch_size: int,
        consumed: int = 0,
        validation_samples: int = 0,
        validation_batch_size: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        if consumed < 0:
            raise ValueError(f"consumed must be at least 0, got {consumed}")
        self.train, self.tokenize, self.batch_size, self.consumed = train, tokenize, batch_size, consumed
        self.validation = _for_validation(validation) if validation is not None else None
        self.validation_samples = validation_samples
        self.validation_batch_size = validation_batch_size or batch_size
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory

    @cached_property
    def train_plan(self) -> Plan:
        """The order of the training samples; reads the indices."""
        return Plan(self.train)

    @cached_property
    def validation_plan(self) -> Plan | None:
        """The order of the validation samples; reads the indices."""
        return Plan(self.validation) if self.validation is not None else None

    def train_dataloader(self) -> StreamLoader:
        """An endless loader that starts at `consumed`."""
        rank, world = self.rank_and_world()
        return StreamLoader(
            self.train,
            self.train_plan,
            self.tokenize,
            batch_size=self.batch_size,
            rank=rank,
            world=world,
            start=self.consumed,
            pin_memory=self.pin_memory,
        )

    def val_dataloader(self) -> ValidationLoader | list[ValidationLoader]:
        """A finite loader, the same length on every rank; an empty list where there is nothing to validate on."""
        if self.validation is None or self.validation_plan is None or self.validation_samples < 1:
            return []
        rank, world = self.rank_and_world()
        return ValidationLoader(
            self.validation,
            self.validation_plan,
            self.tokenize,
            samples=self.validation_samples,
            batch_size=self.validation_batch_size,
            rank=rank,
            world=world,
            pin_memory=self.pin_memory,
        )

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint keeps to notice that the data have changed."""
        return {"stage": self.train.stage, "fingerprint": self.train_plan.fingerprint}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Check that the order is still the one of the checkpoint.

        Raises:
            UserError: shards, seed or rules have changed, so that positions mean other samples.
        """
        if state_dict.get("stage") == self.train.stage and state_dict != self.state_dict():
            raise UserError(
                "the shards, the seed or the rules that choose samples have changed since the checkpoint, so that its "
                "position would mean other samples",
                where=f"data of stage {self.train.stage}",
                hint="restore the former data and settings, or start the stage anew",
            )

    def rank_and_world(self) -> tuple[int, int]:
        """Rank and number of ranks: of torch.distributed, else of the trainer, else 0 and 1."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return 0, 1


def _for_validation(config: StreamConfig) -> StreamConfig:
    crop = replace(config.crop, centre=True, flip=False, buckets=None)
    return replace(config, crop=crop, captions=replace(config.captions, drop=0.0))
