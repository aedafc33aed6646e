"""The ten lines of the README, and what a user of Lightning expects of them."""

import csv
import re
import shutil
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from hdm_lightning import XUT, FlowModule, ShardDataModule, load_autoencoder, load_text_encoder
from hdm_lightning.errors import UserError
from hdm_lightning.training.modules.draws import draw


def test_the_ten_lines(tiny_text_encoder, tiny_autoencoder, tiny_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, vae = load_text_encoder(str(tiny_text_encoder)), load_autoencoder(str(tiny_autoencoder))
    network = XUT.from_preset("xut_tiny", context_width=text.width)
    module = FlowModule(network, text, vae, learning_rate=0.3, routing_rate=0.5)
    shards = str(tiny_shards)
    rest = {"tokenizer": text.tokenizer, "validation": shards, "validation_samples": 8}
    data = ShardDataModule(shards, resolution=32, batch_size=4, **rest)
    trainer = L.Trainer(max_steps=2, val_check_interval=1, check_val_every_n_epoch=None, accelerator="cpu")
    trainer.fit(module, data)
    assert {"train/loss", "val/loss", "lr"} <= set(trainer.callback_metrics)
    path = trainer.checkpoint_callback.best_model_path
    (measured,) = trainer.validate(module, data)
    assert measured["val/loss"] == pytest.approx(float(trainer.callback_metrics["val/loss"]))

    longer = L.Trainer(max_steps=3, val_check_interval=1, check_val_every_n_epoch=None, accelerator="cpu", logger=False)
    assert module.samples_trained == 8
    longer.fit(module, data, ckpt_path=path)
    assert longer.global_step == 3 and module.samples_trained == 12

    loaded = FlowModule.load_from_checkpoint(path, text_encoder=text, autoencoder=vae)
    assert longer.validate(loaded, data) == [measured]


def test_the_readme_s_python_runs_as_it_stands(tiny_autoencoder, tmp_path, monkeypatch):
    """In a folder laid out as its reader's, with a quicker autoencoder and two steps."""
    root = Path(__file__).parents[3]
    (block,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    limits = "max_steps=200, val_check_interval=100"
    assert limits in block
    (tmp_path / "runs" / "openclipart_vae").mkdir(parents=True)
    (tmp_path / "runs" / "openclipart_vae" / "final").symlink_to(tiny_autoencoder)
    shutil.copytree(root / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block.replace(limits, "accelerator='cpu', limit_val_batches=1, max_steps=2, val_check_interval=1"), names)
    assert names["trainer"].global_step == 2
    assert names["trainer"].callback_metrics["val/loss"].isfinite()


def test_metrics_reach_loggers_and_callbacks_of_lightning(flow_module, shard_data, trainer, tmp_path):
    stop, monitor = EarlyStopping("val/loss", patience=1, min_delta=100.0), LearningRateMonitor("step")
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", filename="{step}", save_top_k=1)
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    fit = trainer(
        max_steps=20,
        callbacks=[stop, monitor, best],
        logger=loggers,
        enable_checkpointing=True,
        profiler="simple",
        val_check_interval=2,
    )
    module = flow_module()
    fit.fit(module, shard_data())
    assert fit.global_step == 2  # the second validation is no improvement by 100
    assert best.best_model_score == min(best.best_k_models.values())
    assert torch.load(best.best_model_path, weights_only=True)["global_step"] in (1, 2)

    loggers[0].save()
    with open(f"{loggers[0].log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert [float(row["val/loss"]) for row in rows if row["val/loss"]]
    rates = [float(row["lr"]) for row in rows if row["lr"]]
    assert rates == pytest.approx([0.1, 0.2])  # half of the warm-up, then all of it
    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert {"train/loss", "val/loss", "lr", "lr-AdamW/pg1"} <= set(events.Tags()["scalars"])
    timed = set(fit.profiler.recorded_durations)
    assert {"[FlowModule]encode_images", "[FlowModule]encode_text", "[FlowModule]network"} <= timed


def test_a_rate_of_ones_own_optimizer_is_the_module_s(flow_module, shard_data, trainer):
    """Plain SGD by hand over the module's groups, against what Lightning did with it."""
    module, hand = flow_module(optimizer=torch.optim.SGD, lr_scheduler=None), flow_module(lr_scheduler=None)
    fit = trainer(max_steps=1, accumulate_grad_batches=1, gradient_clip_val=None, val_check_interval=1)
    fit.fit(module, shard_data())
    hand.trainer = trainer(accumulate_grad_batches=1)
    hand.trainer.datamodule = shard_data()
    hand.trainer.training = True
    batch = hand.on_before_batch_transfer(next(iter(shard_data().train_dataloader())), 0)
    t = torch.special.ndtri(batch["uniform"]).sigmoid()
    (hand.losses(batch, hand.network, t) * batch["weight"]).mean().backward()
    for group in hand.parameter_groups():
        for parameter in group["params"]:
            parameter.data -= group["lr"] * (parameter.grad + group["weight_decay"] * parameter.data)
    for name, value in hand.network.state_dict().items():
        torch.testing.assert_close(module.network.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_the_validation_loss_is_the_mean_over_its_samples_without_masked_ones(flow_module, shard_data, trainer):
    """Ten samples in three batches of four; the network's output is zero, so that the loss is the target's square."""
    module, data = flow_module(), shard_data()
    torch.nn.init.zeros_(module.network.output_projection.weight)
    torch.nn.init.zeros_(module.network.output_projection.bias)
    losses = {}
    for batch in data.val_dataloader():
        latent = module.autoencoder.encode(batch["image"].float() / 127.5 - 1)
        noise = draw(0, "validation", batch["index"], tuple(latent.shape[1:]), 0).noise
        squares = (noise - latent).square().flatten(1).mean(1)
        losses |= {index: float(one) for index, one in zip(batch["index"].tolist(), squares, strict=True) if index < 10}
    (measured,) = trainer().validate(module, data)
    assert len(losses) == 10 and measured["val/loss"] == pytest.approx(sum(losses.values()) / 10, rel=1e-5)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3, "accumulate_grad_batches": 1}, 3),
        ({"limit_train_batches": 3, "max_epochs": 2, "max_steps": -1, "check_val_every_n_epoch": 1}, 4),
        ({"limit_val_batches": 1, "max_steps": 2}, 2),
        ({"limit_val_batches": 0, "max_steps": 2}, 2),
        ({"overfit_batches": 2, "max_epochs": 2, "max_steps": -1, "check_val_every_n_epoch": 1}, 2),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_limits_of_the_trainer_count(flow_module, shard_data, trainer, note_steps, limits, steps):
    settings = {"val_check_interval": None} if "max_epochs" in limits else {}
    fit, module = trainer(callbacks=[note_steps], **(settings | limits)), flow_module()
    fit.fit(module, shard_data())
    assert fit.global_step == steps
    assert module.samples_trained == sum(map(len, note_steps.steps))
    if "overfit_batches" in limits:
        assert note_steps.steps[0] == note_steps.steps[1]
    else:
        assert note_steps.samples() == list(range(module.samples_trained))
    assert ("val/loss" in fit.callback_metrics) == (limits.get("limit_val_batches") != 0)


class Scaled(nn.Module):
    """A network of somebody else: scales the latent."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, latent, t, context, **_):
        return latent * self.scale


def test_a_foreign_network_trains_and_must_be_named_again(flow_module, shard_data, trainer, encoders, tmp_path):
    with pytest.raises(UserError, match="patch size"):
        flow_module(Scaled())
    module = flow_module(Scaled(), patch_size=1, rule="constant")
    fit = trainer()
    fit.fit(module, shard_data())
    assert not torch.equal(module.network.scale, torch.ones(4, 1, 1))
    fit.save_checkpoint(tmp_path / "foreign.ckpt")
    parts = dict(zip(("text_encoder", "autoencoder"), encoders, strict=True))
    with pytest.raises(UserError, match="not an XUT"):
        FlowModule.load_from_checkpoint(tmp_path / "foreign.ckpt", **parts)
    loaded = FlowModule.load_from_checkpoint(tmp_path / "foreign.ckpt", network=Scaled(), **parts)
    assert torch.equal(loaded.network.scale, module.network.scale)


def test_a_checkpoint_holds_the_network_alone_and_says_how_it_was_trained(flow_module, shard_data, trainer, tmp_path):
    module, fit = flow_module(routing_rate=0.25, stage="px16"), trainer()
    fit.fit(module, shard_data(stage="px16"))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"network"}
    settings = saved["hyper_parameters"]
    assert (settings["learning_rate"], settings["routing_rate"], settings["stage"]) == (0.2, 0.25, "px16")
    assert XUT(type(module.network.config).from_json(settings["network_config"])).config == module.network.config


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"routing_rate": 1.0}, "routing_rate"),
        ({"time_std": -1.0}, "time_std"),
        ({"rule": "nothing"}, "rule"),
    ],
)
def test_settings_that_cannot_work_are_named(flow_module, changes, where):
    with pytest.raises(UserError) as mistake:
        flow_module(**changes).parameter_groups()
    assert mistake.value.where == where


class FilesMet(L.Callback):
    """Notes the package's files of which code runs while nine batches are read, encoded and trained on."""

    def __init__(self):
        self.files = set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Listen once all has been set up, until every window of samples has been read anew."""
        if batch_idx in (0, 9):
            sys.setprofile(None if batch_idx else self.note)

    def note(self, frame, event, argument):
        """Note the file of a call."""
        name = frame.f_code.co_filename
        if event == "call" and "hdm_lightning" in name and "/src/" in name:
            self.files.add(name.partition("hdm_lightning/")[2])


def test_no_more_files_lie_on_a_sample_s_way_than_the_documentation_says(flow_module, shard_data):
    met = FilesMet()
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    L.Trainer(max_steps=10, limit_val_batches=0, callbacks=[met], **options).fit(flow_module(), shard_data())
    assert {"data/reader.py", "models/xut.py", "training/modules/flow_module.py"} <= met.files
    page = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text()
    (told,) = re.findall(r"^\| files of which code runs for a sample.*\| (\d+) \|$", page, re.MULTILINE)
    assert len(met.files) <= int(told), " ".join(sorted(met.files))
