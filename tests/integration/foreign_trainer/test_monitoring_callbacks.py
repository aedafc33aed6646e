"""What callbacks of a plain Trainer measure, against numbers computed apart from them."""

import csv
import json
import time
from collections import defaultdict

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hdm_lightning.training.callbacks import progress_bar
from hdm_lightning.training.callbacks.images import SampleImages
from hdm_lightning.training.callbacks.keep_ledger import KeepLedger
from hdm_lightning.training.callbacks.progress_bar import Progress
from hdm_lightning.training.callbacks.step_metrics import DataSeen, LossByTime, Norms, QuarantineCount
from hdm_lightning.training.callbacks.throughput import Throughput
from hdm_lightning.training.callbacks.weight_averages import WeightAverages
from hdm_lightning.training.loggers import on_sample_axis
from hdm_lightning.training.optimization.moments import CarryMoments


class Record(Logger):
    """Remembers every entry as (step, metrics); nothing goes to disk."""

    name, version = "record", 0

    def __init__(self):
        super().__init__()
        self.entries = []

    def log_hyperparams(self, *arguments, **named):
        """Not looked at here."""

    def log_metrics(self, metrics, step=None):
        """One more entry."""
        self.entries.append((step, dict(metrics)))

    def values(self, name):
        """All values of a metric, in order."""
        return [metrics[name] for _, metrics in self.entries if name in metrics]


class Mask(L.Callback):
    """Gives samples weight 0 before the module sees them, as data that could not be read has it."""

    def __init__(self, *positions):
        self.positions = torch.tensor(positions)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """In place."""
        batch["weight"][torch.isin(batch["index"], self.positions)] = 0.0


class NoteLosses(L.Callback):
    """Every sample's (step, loss, time, weight)."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """As the module gave them."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        values = (outputs["sample_losses"], outputs["times"], batch["weight"])
        self.rows += [(step, *row) for row in torch.stack(values, 1).tolist()]


def test_loss_by_time_is_a_histogram_of_all_samples_since_the_last_entry(flow_module, shard_data, trainer):
    noted, logger = NoteLosses(), Record()
    callbacks = [Mask(5, 20), LossByTime(bins=4), noted]
    fit = trainer(callbacks=callbacks, logger=logger, log_every_n_steps=3, limit_val_batches=0)
    fit.fit(flow_module(), shard_data())
    rows = np.array(noted.rows)
    for entry, steps in enumerate(((0, 1, 2), (3, 4, 5))):
        loss, t, weight = rows[np.isin(rows[:, 0], steps), 1:].T
        total, edges = np.histogram(t, bins=4, range=(0, 1), weights=loss * weight)
        count, _ = np.histogram(t, bins=4, range=(0, 1), weights=weight)
        for number in range(4):
            name = f"loss_by_time/{edges[number]:.3f}-{edges[number + 1]:.3f}"
            if count[number]:
                assert logger.values(name)[entry] == pytest.approx(total[number] / count[number], rel=1e-5)
        assert logger.values("train/loss_mean")[entry] == pytest.approx((loss * weight).sum() / weight.sum(), rel=1e-5)


def test_loss_by_time_counts_the_samples_of_all_processes(flow_module, shard_data, trainer, on_processes):
    def fit(**processes):
        logger = Record()
        run = trainer(callbacks=[LossByTime()], logger=logger, log_every_n_steps=6, **processes)
        run.fit(flow_module(), shard_data(4 // run.world_size))
        return logger.entries

    def losses(entries):
        found = [metrics for _, metrics in entries if "train/loss_mean" in metrics]
        return {name: value for metrics in found for name, value in metrics.items()}

    assert losses(on_processes(2, fit)[0]) == pytest.approx(losses(fit()), rel=1e-4)


def test_data_seen_counts_masked_samples_also_over_a_restart(flow_module, shard_data, trainer, tmp_path):
    """Two masked samples before the checkpoint and one after it; forty samples are one pass."""
    quarantine, logger = tmp_path / "quarantine.jsonl", Record()
    rows = [{"shard": "a", "key": str(k), "ordinal": k, "reason": "r", "index": i} for i, k in enumerate((1, 2, 2))]
    quarantine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = trainer(callbacks=[Mask(3, 4), DataSeen(quarantine)], max_steps=4)
    first.fit(flow_module(), shard_data())
    first.save_checkpoint(tmp_path / "four.ckpt")
    second = trainer(callbacks=[Mask(40), DataSeen(quarantine)], logger=logger)
    second.fit(flow_module(), shard_data(), ckpt_path=tmp_path / "four.ckpt")
    last = {name: logger.values(f"seen/{name}")[-1] for name in ("samples", "passes", "masked", "quarantined")}
    assert last == {"samples": 48, "passes": 1.2, "masked": 3, "quarantined": 2}


def test_a_growing_quarantine_is_read_on_from_where_it_was(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    count = QuarantineCount(path)
    assert count.count() == 0
    line = '{"shard": "a", "key": "%d", "reason": "r", "index": %d}\n'
    path.write_text(line % (1, 0) + line % (1, 9) + (line % (2, 3))[:10])
    assert count.count() == 1  # the same sample twice, and half a line
    path.write_text(line % (1, 0) + line % (1, 9) + line % (2, 3))
    assert count.count() == 2


def test_norms_are_those_before_clipping_and_after_the_step(flow_module, shard_data, trainer):
    norms, logger = defaultdict(list), Record()

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            norms["gradient"].append(np.sqrt(sum(p.grad.square().sum().item() for p in pl_module.network.parameters())))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            norms["weight"].append(np.sqrt(sum(p.square().sum().item() for p in pl_module.network.parameters())))

    fit = trainer(callbacks=[Norms(), Note()], logger=logger, gradient_clip_val=0.01, limit_val_batches=0)
    fit.fit(flow_module(), shard_data())
    assert logger.values("optimizer/gradient_norm") == pytest.approx(norms["gradient"], rel=1e-5)
    assert logger.values("optimizer/weight_norm") == pytest.approx(norms["weight"][1::2], rel=1e-5)


def test_speed_and_the_parts_of_a_step_count_training_alone(flow_module, shard_data, trainer, monkeypatch):
    """By a clock that only what is named here turns: a micro-batch of 0.1 s, and 0.15 s of callbacks after it."""
    now, logger, module, data = [0.0], Record(), flow_module(), shard_data()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def taking(seconds, function=None):
        def later(*args, **kwargs):
            now[0] += seconds
            return None if function is None else function(*args, **kwargs)

        return later

    class Later(L.Callback):
        def __init__(self, hook, seconds):
            setattr(self, hook, taking(seconds))

    for name, seconds in (("latents", 0.01), ("context", 0.02)):
        monkeypatch.setattr(module.encoders, name, taking(seconds, getattr(module.encoders, name)))
    module.network.register_forward_hook(taking(0.03))
    inside, after = Later("on_train_batch_start", 0.04), Later("on_train_batch_end", 0.15)
    callbacks = [
        inside,
        Later("on_before_optimizer_step", 0.05),
        Throughput(),
        after,
        Later("on_validation_start", 0.5),
    ]
    settings = {"max_steps": 8, "log_every_n_steps": 4, "val_check_interval": 8, "num_sanity_val_steps": 0}
    fit = trainer(callbacks=callbacks, logger=logger, **settings)
    fit.fit(module, data)
    step = 2 * (0.01 + 0.02 + 0.03 + 0.04) + 0.05
    assert logger.values("step_time_ms/whole") == pytest.approx([1000 * step] * 2)
    assert logger.values("speed/images_per_s") == pytest.approx([8 / step] * 2)
    # The last micro-batch's rest and the validation, which has three batches of both encoders and the network, follow.
    aside = [7 * 0.15, 8 * 0.15 + 0.5 + 3 * 0.06]
    share = [4 * step / (4 * step + seconds) for seconds in aside]
    assert logger.values("speed/training_share") == pytest.approx(share)
    for name, milliseconds in (("vae", 20), ("text", 40), ("xut", 60), ("backward", 0), ("data", 0)):
        assert logger.values(f"step_time_ms/{name}") == pytest.approx([milliseconds] * 2, abs=1e-6)
    assert type(fit.profiler).__name__ == "PassThroughProfiler"
    assert logger.values("memory_gb/host")[0] > 0.05


def test_speed_and_samples_seen_are_logged_for_batches_that_are_bare_tensors(trainer):
    logger = Record()
    fit = trainer(callbacks=[Throughput(), DataSeen()], logger=logger, max_steps=2, limit_val_batches=0)
    fit.fit(BoringModel())
    assert len(logger.values("speed/images_per_s")) == 2 and logger.values("seen/masked") == [0.0, 0.0]


def test_flops_are_what_torch_counts(flow_module, shard_data, trainer):
    """Two operations a multiply-add, forward and backward, of the very samples without padding; routed by half."""
    logger, counted, fed, module = Record(), [], [], flow_module()

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            aspect, keep = torch.zeros(1), torch.arange(8).expand(1, 8)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                for length in batch["lengths"].tolist():
                    latent, context = torch.zeros(1, 4, 4, 4, requires_grad=True), torch.zeros(1, length, 16)
                    context.requires_grad_()
                    pl_module.network(latent, aspect, context, log_aspect_ratio=aspect, keep=keep).sum().backward()
            counted.append(counter.get_total_flops())
            fed.append((int(batch["lengths"].sum()), 4 * int(batch["lengths"].max())))
            pl_module.zero_grad()

    throughput = Throughput(peak_tflops=0.5)
    fit = trainer(callbacks=[throughput, Count()], logger=logger, max_steps=1)
    fit.fit(module, shard_data(captions={"drop": 0.4}))
    seconds = logger.values("step_time_ms/whole")[0] / 1000
    assert len({true for true, _ in fed}) > 1
    assert logger.values("speed/tflops")[0] * seconds * 1e12 == pytest.approx(sum(counted), rel=0.01)
    assert logger.values("speed/mfu")[0] == pytest.approx(logger.values("speed/tflops")[0] / 0.5)
    true, padded = (sum(column) for column in zip(*fed, strict=True))
    assert logger.values("speed/padding_share")[0] == pytest.approx(1 - true / padded)


def test_the_progress_line_says_where_the_training_is(flow_module, shard_data, trainer, tmp_path, monkeypatch, capsys):
    """Five seconds a micro-batch: 48 samples in a minute, of which half are left, and twice as many after this."""
    now = [1000.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])

    class Later(L.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 5.0

    ledger, shown = KeepLedger(tmp_path / "ledger.jsonl", usd_per_device_hour=3600.0), Progress(samples_after=48.0)
    fit = trainer(callbacks=[Later(), ledger, shown], enable_progress_bar=True, limit_val_batches=0)
    fit.fit(flow_module(stage="px16"), shard_data(stage="px16"))
    half, end = [line for line in capsys.readouterr().out.splitlines() if line.startswith("px16: ")]
    loss = f"loss {float(fit.callback_metrics['train/loss']):.4f}"
    assert end == f"px16: 48/48 samples · 0.8 images/s · {loss} · 0 s left, 60 s for all stages · $60.00"
    assert half.startswith("px16: 24/48 samples · 0.8 images/s · loss ")
    assert half.endswith(" · 30 s left, 90 s for all stages · $30.00")


def test_any_logger_can_stand_on_an_axis_of_samples(flow_module, shard_data, trainer, tmp_path):
    module = flow_module()
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    loggers = [on_sample_axis(logger, module, samples_before=1000) for logger in loggers]
    trainer(logger=loggers, log_every_n_steps=2).fit(module, shard_data())
    with open(f"{loggers[0].log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [1016, 1032, 1048]
    assert sorted({int(row["step"]) for row in rows if row["val/loss"]}) == [1016, 1032, 1048]
    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [1016, 1032, 1048]


def test_prompts_are_drawn_with_the_average_in_every_shape(flow_module, shard_data, trainer, tmp_path):
    """The average is set to other weights, which another module has as its own."""
    module, logger = flow_module(), TensorBoardLogger(tmp_path, "tb")
    options = {"resolution": 16, "aspect_ratios": (1.0, 2.0), "steps": 2, "context_length": 8, "samples_before": 100}
    averages = WeightAverages([1e12], ramp=0.0)  # never moves away from the first weights
    images = SampleImages(["a red circle", "a blue star"], folder=tmp_path / "drawn", every_n_steps=4, **options)
    fit = trainer(callbacks=[averages, images], logger=logger)
    fit.fit(module, shard_data())
    names = ["000000000132-12x12.png", "000000000132-24x12.png", "000000000148-12x12.png", "000000000148-24x12.png"]
    sizes = {path.name.split("-")[1] for path in (tmp_path / "drawn").iterdir()}
    assert len(list((tmp_path / "drawn").iterdir())) == len(names) and len(sizes) == 2
    drawn = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "drawn").iterdir()}
    early, late = (sorted(name for name in drawn if name.startswith(f"{seen:012d}")) for seen in (132, 148))
    assert all(np.array_equal(drawn[a], drawn[b]) for a, b in zip(early, late, strict=True))
    raw = SampleImages(["a red circle", "a blue star"], folder=tmp_path / "raw", **options)
    trainer(callbacks=[raw]).fit(flow_module(), shard_data())
    assert any(
        not np.array_equal(drawn[path.name], np.asarray(Image.open(path))) for path in (tmp_path / "raw").iterdir()
    )
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert len(events.Tags()["images"]) == 2


def test_prompts_are_drawn_by_time_and_by_another_network_not_at_all(flow_module, shard_data, trainer, tmp_path):
    options = {"resolution": 16, "aspect_ratios": (1.0,), "steps": 1, "context_length": 8}
    soon = SampleImages(["a star"], folder=tmp_path / "soon", every_minutes=1e-9, **options)
    late = SampleImages(["a star"], folder=tmp_path / "late", every_minutes=60.0, **options)
    module = flow_module()
    trainer(callbacks=[soon, late]).fit(module, shard_data())
    seen = [[int(path.name.split("-")[0]) for path in sorted((tmp_path / name).iterdir())] for name in ("soon", "late")]
    assert seen == [[8 * step for step in range(1, 7)], [48]]
    foreign = SampleImages(["a star"], folder=tmp_path / "foreign", **options)
    module.network = torch.nn.Identity()
    foreign._draw_once(trainer(), module)
    assert not (tmp_path / "foreign").exists()


def test_moments_are_carried_over_and_rates_are_not(flow_module, shard_data, trainer, tmp_path):
    first = trainer(max_steps=3)
    first.fit(flow_module(), shard_data())
    first.save_checkpoint(tmp_path / "first.ckpt")
    found = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            (optimizer,) = trainer.optimizers
            parameter = optimizer.param_groups[0]["params"][0]
            found.setdefault("moment", optimizer.state[parameter]["exp_avg"].clone())
            found.setdefault("rate", optimizer.param_groups[0]["lr"])

    second = flow_module(learning_rate=0.05, lr_scheduler=None)
    trainer(max_steps=1, callbacks=[CarryMoments(tmp_path / "first.ckpt"), Look()]).fit(second, shard_data())
    parameter = first.optimizers[0].param_groups[0]["params"][0]
    assert torch.equal(found["moment"], first.optimizers[0].state[parameter]["exp_avg"])
    assert found["rate"] == second.parameter_groups()[0]["lr"]
