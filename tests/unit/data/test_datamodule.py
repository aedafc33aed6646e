"""The data module in somebody else's trainer: a module that only records what it is fed, killed and resumed."""

import contextlib
import os
from functools import partial

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from hdm_lightning import ShardDataModule
from hdm_lightning.errors import UserError


class Recorder(LightningModule):
    """A foreign module: one weight, and the positions of every micro-batch and optimizer step."""

    def __init__(self, die_at=None):
        super().__init__()
        self.weight, self.die_at = torch.nn.Parameter(torch.zeros(1)), die_at
        self.seen, self.validated, self.sizes = [], [], set()

    def training_step(self, batch, number):
        if self.die_at is not None and len(self.seen) == self.die_at:
            raise KeyboardInterrupt("killed")
        self.seen.append(batch["index"].tolist())
        return (self.weight * batch["image"].float().mean()).sum()

    def validation_step(self, batch, number):
        self.validated += batch["index"][batch["weight"] > 0].tolist()
        self.sizes.add(batch["set_size"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Counting(Recorder):
    """A module that counts for itself and steps by hand every second micro-batch, which no trainer can see."""

    def __init__(self, die_at=None):
        super().__init__(die_at)
        self.automatic_optimization, self.samples_trained, self.waiting = False, 0, 0

    def training_step(self, batch, number):
        self.manual_backward(super().training_step(batch, number))
        self.waiting += len(batch["index"])
        if number % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
            self.samples_trained, self.waiting = self.samples_trained + self.waiting, 0


def trainer(folder=None, **options):
    """A plain trainer of the CPU; with a folder, it saves every step there."""
    saves = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)] if folder else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**{"callbacks": saves, "enable_checkpointing": bool(saves), "devices": 1, **quiet, **options})


def flat(batches):
    return [index for batch in batches for index in batch]


def killed(module, data, **options):
    """Fit until the module dies; Lightning turns the interruption into an exit."""
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(**options).fit(module, data)


@pytest.mark.parametrize(("accumulation", "then"), [(1, 1), (2, 2), (2, 1), (1, 4)])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_fit_continues_with_the_very_next_sample(kit, shards, tmp_path, accumulation, then, workers):
    """Also with another accumulation; what came after the last step before the death is seen again."""
    build = partial(kit.data_module, shards, batch_size=4, consumed=30, validation_samples=0, num_workers=workers)
    first = Recorder(die_at=7)
    killed(first, build(), folder=tmp_path, max_steps=20, accumulate_grad_batches=accumulation)
    assert flat(first.seen) == list(range(30, 30 + 28))
    steps = 7 // accumulation
    second = Recorder()
    trainer(max_steps=steps + 3, accumulate_grad_batches=then).fit(
        second, build(consumed=0), ckpt_path=tmp_path / f"step={steps}.ckpt"
    )
    begin = 30 + 4 * accumulation * steps
    assert flat(second.seen) == list(range(begin, begin + 4 * len(second.seen)))
    assert len(second.seen) >= 2 * then


def test_a_checkpoint_in_the_middle_of_an_accumulation_counts_to_the_last_step(kit, shards, tmp_path):
    build = partial(kit.data_module, shards, batch_size=4, validation_samples=0)
    saver, data = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=1, save_on_exception=True), build()
    killed(
        Recorder(die_at=6), data, max_steps=9, accumulate_grad_batches=4, callbacks=[saver], enable_checkpointing=True
    )
    assert data.state_dict()["consumed"] == 16
    states = [torch.load(file, weights_only=True)["ShardDataModule"] for file in tmp_path.glob("*.ckpt")]
    assert {state["consumed"] for state in states} == {16}


def test_a_module_that_counts_for_itself_is_believed(kit, shards, tmp_path):
    build = partial(kit.data_module, shards, batch_size=4, validation_samples=0)
    data = build()
    killed(Counting(die_at=5), data, folder=tmp_path, max_steps=9)
    assert data.position == 16
    second = Counting()
    trainer(max_steps=4).fit(second, build(), ckpt_path=tmp_path / "step=2.ckpt")
    assert flat(second.seen) == list(range(16, 32))


def test_epochs_are_parts_of_one_endless_stream(kit, shards, tmp_path):
    """Also where an epoch ends inside an accumulation, where Lightning steps early; and a resumed one."""
    build = partial(kit.data_module, shards, batch_size=4, validation_samples=0)
    options = {"max_epochs": 4, "limit_train_batches": 5, "accumulate_grad_batches": 2}
    whole, data = Recorder(), build()
    trainer(**options).fit(whole, data)
    assert flat(whole.seen) == list(range(4 * 5 * 4)) and data.position == 80
    first = Recorder(die_at=12)
    killed(first, build(), folder=tmp_path, **options)
    second = Recorder()
    trainer(**options).fit(second, build(), ckpt_path=tmp_path / "step=7.ckpt")  # 2 epochs and a step of the third
    assert flat(second.seen) == list(range(48, 80))


def test_a_second_fit_of_the_same_trainer_continues_and_a_new_one_begins_anew(kit, shards):
    data, engine = kit.data_module(shards, batch_size=4, validation_samples=0), trainer(max_steps=3)
    module = Recorder()
    engine.fit(module, data)
    engine.fit_loop.epoch_loop.max_steps = 5
    engine.fit(module, data)
    assert flat(module.seen) == list(range(20))
    other = Recorder()
    trainer(max_steps=2).fit(other, data)
    assert flat(other.seen) == list(range(8))


def test_skipping_wins_over_the_checkpoint_once(kit, shards, tmp_path):
    build = partial(kit.data_module, shards, batch_size=4, validation_samples=0)
    trainer(tmp_path, max_steps=3).fit(Recorder(), build())
    data, second, third = build(), Recorder(), Recorder()
    data.skip_to(100)
    trainer(tmp_path / "skipped", max_steps=4).fit(second, data, ckpt_path=tmp_path / "step=2.ckpt")
    assert flat(second.seen) == list(range(100, 108))
    trainer(max_steps=5).fit(third, data, ckpt_path=tmp_path / "skipped" / "step=3.ckpt")
    assert flat(third.seen) == list(range(104, 112))


def test_the_debugging_modes_of_lightning(kit, shards):
    data, module = kit.data_module(shards, batch_size=4, validation_samples=10), Recorder()
    trainer(fast_dev_run=True).fit(module, data)
    assert flat(module.seen) == list(range(4)) and sorted(module.validated) == list(range(4))
    data, module = kit.data_module(shards, batch_size=4, consumed=8, validation_samples=0), Recorder()
    trainer(overfit_batches=2, max_epochs=3).fit(module, data)
    assert flat(module.seen) == [*range(8, 16)] * 3 and data.position == 8


def test_validation_in_a_foreign_trainer_is_the_fixed_set(kit, shards, tmp_path):
    data, module = kit.data_module(shards, batch_size=4, validation_samples=10), Recorder()
    trainer(tmp_path, max_steps=4, val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0).fit(
        module, data
    )
    assert module.validated == [*range(10)] * 2 and module.sizes == {10}
    moved = kit.data_module(shards, batch_size=4, validation_samples=10, seed=99)
    alone = Recorder()
    trainer().validate(alone, moved, ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    assert alone.validated == [*range(10)]
    with pytest.raises(UserError, match="have changed"):
        trainer(max_steps=9).fit(Recorder(), moved, ckpt_path=tmp_path / "step=4.ckpt")


def test_a_step_of_the_trainer_shares_a_bucket(kit, tmp_path):
    entries = []
    for number in range(90):
        width = 16 if number % 3 else 32
        entries += [(f"{number}.png", kit.coloured(number, width=width)), (f"{number}.txt", b"x")]
    kit.indexed(tmp_path / "a.tar", entries)
    crop = {"buckets": {"step_px": 8, "max_aspect": 4.0}}
    data = kit.data_module(tmp_path, resolution=32, batch_size=3, validation_samples=0, crop=crop)
    shapes = []

    class Shapes(Recorder):
        def training_step(self, batch, number):
            shapes.append(tuple(batch["image"].shape[2:]))
            return super().training_step(batch, number)

    trainer(max_steps=12, accumulate_grad_batches=2).fit(Shapes(), data)
    steps = [set(shapes[at : at + 2]) for at in range(0, 24, 2)]
    assert all(len(step) == 1 for step in steps) and len(set.union(*steps)) == 2
    assert data.training_stream.crop.buckets.block == 6


def fit_rank(rank, world, build, folder, steps, checkpoint, accumulation, die_at, meeting, results):
    """One of several ranks of a foreign run."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    module = Recorder(die_at)
    engine = trainer(
        folder,
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        devices=world,
        strategy="ddp",
        use_distributed_sampler=False,
    )
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        engine.fit(module, build(), ckpt_path=checkpoint)
    results.put((rank, module.seen))


def fit_ranks(world, build, folder, *, steps, meeting, checkpoint=None, accumulation=1, die_at=None):
    """What each rank has seen, in the order of ranks."""
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    arguments = (build, folder, steps, checkpoint, accumulation, die_at, meeting, results)
    ranks = [context.Process(target=fit_rank, args=(rank, world, *arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    found = dict(results.get() for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return [found[rank] for rank in range(world)]


@pytest.mark.parametrize(("worlds", "accumulations"), [((2, 1), (1, 2)), ((1, 2), (4, 2)), ((2, 2), (2, 1))])
def test_ranks_die_and_others_continue(kit, shards, tmp_path, worlds, accumulations):
    """Two fits in processes of their own, the first killed, against the positions of an uninterrupted one."""
    build = partial(kit.data_module, shards, batch_size=4, validation_samples=0)
    before, after = accumulations
    died = fit_ranks(
        worlds[0], build, tmp_path / "a", steps=9, accumulation=before, die_at=5 * before, meeting=tmp_path / "m1"
    )
    assert sorted(index for seen in died for index in flat(seen)) == list(range(5 * before * worlds[0] * 4))
    checkpoint = tmp_path / "a" / "step=4.ckpt"
    resumed = fit_ranks(
        worlds[1], build, tmp_path / "b", steps=7, accumulation=after, checkpoint=checkpoint, meeting=tmp_path / "m2"
    )
    begin = 4 * before * worlds[0] * 4
    seen = sorted(index for rank in resumed for index in flat(rank))
    assert seen == list(range(begin, begin + len(seen))) and len(seen) >= 2 * after * worlds[1] * 4
    for rank, batches in enumerate(resumed):
        assert {index % worlds[1] for index in flat(batches)} == {rank}


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"batch_size": 0}, "data.batch_size"),
        ({"consumed": -1}, "data.consumed"),
        ({"validation_samples": -1}, "data.validation_samples"),
        ({"validation_batch_size": 0}, "data.validation_batch_size"),
        ({"samples_per_step": 0}, "data.samples_per_step"),
        ({"num_workers": -1}, "data.workers"),
        ({"resolution": 0}, "data.resolution"),
        ({"tokenizer": "words"}, "data.tokenizer"),
        ({"crop": "centre"}, "data.crop"),
        ({"crop": {"max_aspekt": 2}}, "data.crop.max_aspekt"),
        ({"crop": {"max_aspect": "wide"}}, "data.crop.max_aspect"),
        ({"crop": {"max_aspect": True}}, "data.crop.max_aspect"),
        ({"crop": {"max_aspect": 0.5}}, "data.crop.max_aspect"),
        ({"crop": {"buckets": {"step_px": 0}}}, "data.crop.buckets.step_px"),
        ({"crop": {"buckets": {"block": 8}}}, "data.crop.buckets.block"),
        ({"captions": {"fields": "caption"}}, "data.captions.fields"),
        ({"captions": {"fields": ["caption", 3]}}, "data.captions.fields[1]"),
        ({"captions": {"tags": {"tag_drop": 2}}}, "data.captions.tags.tag_drop"),
        ({"validation": [{"url": "x"}]}, "data.validation[0]"),
        ({"validation": []}, "data.validation"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_read(kit, options, where):
    with pytest.raises(UserError) as caught:
        kit.data_module("no/such/folder", **{"batch_size": 2, **options})
    assert caught.value.where == where and caught.value.hint


def test_arguments_mean_what_they_say(kit, shards):
    crop = {"max_upscale": None, "max_aspect": 2, "flip": True, "buckets": {"step_px": 8}}
    captions = {"fields": ["text"], "tags": {"tag_drop": 0.5}}
    data = ShardDataModule([shards], resolution=16, batch_size=2, crop=crop, captions=captions, samples_per_step=8)
    stream = data.training_stream
    assert (stream.crop.max_upscale, stream.crop.max_aspect, stream.crop.flip) == (None, 2.0, True)
    assert (stream.crop.buckets.step_px, stream.crop.buckets.block) == (8, 8)
    assert stream.captions.fields == ("text",) and stream.captions.tags.tag_drop == 0.5
    assert stream.captions.allow_missing  # no tokenizer, so that captions play no part
    assert data.validation_stream.sources == stream.sources and data.validation_stream.stage == "validation"

    class Tokens:
        def bind(self, context_length):
            return lambda caption: ([context_length], 1)

    assert kit.data_module(shards, batch_size=1, tokenizer=Tokens()).tokenize("x") == ([24], 1)
    data = kit.data_module("no/such/folder", batch_size=2)
    with pytest.raises(UserError, match="no such folder"):
        data.prepare()
