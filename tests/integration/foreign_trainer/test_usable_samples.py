"""A mean over nothing is an error: in training and validation, at the first occasion and at the fit's end."""

import random

import pytest
import torch

from hdm_lightning.errors import UserError
from hdm_lightning.training.callbacks.stage_checkpoint import StageCheckpoint
from hdm_lightning.training.callbacks.usable_samples import UsableSamples
from hdm_lightning.training.checkpoint_io import checkpoints_in


def masking(data, bad, *, validation=False):
    """The data with those samples masked, by their position, of which `bad` says whether."""
    name = "val_dataloader" if validation else "train_dataloader"
    loader = getattr(data, name)

    class Masked:
        def __init__(self):
            self.loader = loader()

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for batch in self.loader:
                batch["weight"] = torch.tensor([0.0 if bad(index) else 1.0 for index in batch["index"].tolist()])
                yield batch

    def masked():
        made = Masked()
        if not validation:
            del Masked.__len__
        return made

    setattr(data, name, masked)
    return data


def test_a_training_without_any_usable_sample_ends_at_once(flow_module, shard_data, trainer):
    run = trainer(callbacks=[UsableSamples()], limit_val_batches=0)
    with pytest.raises(UserError, match="none of 16 consecutive samples could be used") as caught:
        run.fit(flow_module(), masking(shard_data(), lambda index: True))
    assert caught.value.where == "data.train" and run.global_step == 2  # steps of 8


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_a_fit_too_short_for_that_ends_the_same_whatever_share_may_be_bad(flow_module, shard_data, trainer, share):
    run = trainer(callbacks=[UsableSamples(share)], limit_val_batches=0, max_steps=1)
    with pytest.raises(UserError, match="8 of 8 samples of the training could not be used") as caught:
        run.fit(flow_module(), masking(shard_data(), lambda index: True))
    assert caught.value.where == "data.train" and "max_bad_share" not in str(caught.value)


def test_a_training_that_runs_out_of_usable_samples_ends_at_the_next_checkpoint(
    flow_module, shard_data, trainer, tmp_path
):
    save = StageCheckpoint(tmp_path, every_n_steps=2)
    run = trainer(callbacks=[UsableSamples(), save], enable_checkpointing=True, limit_val_batches=0)
    with pytest.raises(UserError, match="none of 16 consecutive samples"):
        run.fit(flow_module(), masking(shard_data(), lambda index: index >= 16))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000002.ckpt"]


@pytest.mark.parametrize("seed", range(6))
def test_a_short_fit_is_judged_at_its_end_by_the_share_that_may_be_bad(
    flow_module, shard_data, trainer, tmp_path, capsys, seed
):
    lot = random.Random(seed)
    bad = set(lot.sample(range(2, 48), lot.randint(1, 8)))  # of 48, none of the first two
    share = lot.choice([0.02, 0.1, 0.2])
    data = masking(shard_data(max_bad_share=share), bad.__contains__)
    save = StageCheckpoint(tmp_path, every_n_steps=3)
    run = trainer(callbacks=[UsableSamples(), save], enable_checkpointing=True, limit_val_batches=0)
    told = f"{len(bad)} of 48 samples of the training could not be used"
    if len(bad) > share * 48:
        with pytest.raises(UserError, match=told) as caught:
            run.fit(flow_module(), data)
        assert caught.value.where == "data.max_bad_share"
        # What was counted is in the checkpoint: the same again ends the same, and with a larger share it is done.
        for allowed in (share, 0.5):
            again = trainer(callbacks=[UsableSamples(allowed)], limit_val_batches=0)
            end = checkpoints_in(tmp_path)[-1]
            if allowed == share:
                with pytest.raises(UserError, match=told):
                    again.fit(flow_module(), masking(shard_data(), bad.__contains__), ckpt_path=end)
            else:
                again.fit(flow_module(), masking(shard_data(), bad.__contains__), ckpt_path=end)
    else:
        run.fit(flow_module(), data)
        assert told in capsys.readouterr().out


@pytest.mark.parametrize("sanity", [0, -1])
def test_a_validation_set_without_a_usable_sample_is_an_error_before_or_at_its_first_time(
    flow_module, shard_data, trainer, sanity
):
    run = trainer(callbacks=[UsableSamples()], num_sanity_val_steps=sanity)
    with pytest.raises(UserError, match="none of the validation samples could be used") as caught:
        run.fit(flow_module(), masking(shard_data(), lambda index: True, validation=True))
    assert caught.value.where == "data.validation" and run.global_step == (0 if sanity else 2)


def test_two_processes_count_together(flow_module, shard_data, trainer, on_processes):
    """All samples of process 1 are bad in training, which is half; one validation sample in ten is good."""

    def fit(**processes):
        data = masking(shard_data(2, max_bad_share=0.6), lambda index: index % 2 == 1)
        data = masking(data, lambda index: index > 0, validation=True)
        used = UsableSamples()
        run = trainer(callbacks=[used], **processes)
        run.fit(flow_module(), data)
        return used.seen, used.bad

    assert on_processes(2, fit) == [(48, 24), (48, 24)]
