"""Throughput, memory, data counts, the progress line and the settings' row, against numbers computed apart."""

import ast
import io
import json
import mmap
import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.routing import random_keep
from hdm_lightning.training.callbacks import progress
from hdm_lightning.training.callbacks.ledger import KeepLedger, Ledger
from hdm_lightning.training.flow_step import fed_tokens
from hdm_lightning.training.monitoring import throughput
from hdm_lightning.training.monitoring.clock import SectionClock
from hdm_lightning.training.monitoring.data_counts import DataCounts
from hdm_lightning.training.monitoring.hparams import flat_settings
from hdm_lightning.training.monitoring.memory_use import memory_gb
from hdm_lightning.training.monitoring.throughput import peak_tflops, stage_flops, training_flops
from hdm_lightning.training.settings import ScheduleSettings, StageSettings
from hdm_lightning.training.stages import plan_stages

CONFIG = XUTConfig(width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=1, blocks_after=1)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_training_flops_are_what_torch_counts_in_a_forward_and_backward_pass(rate):
    network = XUT(CONFIG)
    latent = torch.randn(1, 4, 8, 8, requires_grad=True)  # else the first layers' backward is spared
    context = torch.randn(1, 6, 16, requires_grad=True)
    keep = random_keep(1, 16, rate, torch.Generator().manual_seed(0)) if rate else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted
        network(latent, torch.rand(1), context, keep=keep).sum().backward()
    counted = training_flops(CONFIG, (8, 8), 6, rate)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_stage_is_counted_with_its_context_and_routing():
    stage = StageSettings(resolution=64, routing_rate=0.5, context_length=6)
    assert stage_flops(CONFIG, stage, factor=8) == training_flops(CONFIG, (8, 8), 6, 0.5)
    assert stage_flops(CONFIG, stage, factor=8) < training_flops(CONFIG, (8, 8), 6, 0.0)


def test_peak_rate_is_as_configured_or_of_a_known_gpu(monkeypatch):
    assert peak_tflops(torch.device("cpu"), None) is None
    assert peak_tflops(torch.device("cpu"), 2.5) == 2.5
    for name, peak in (("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA GeForce RTX 5090", 209.5), ("Odd Card 7", None)):
        monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tflops(torch.device("cuda"), None) == peak


def test_resident_memory_follows_an_allocation_of_known_size():
    before = memory_gb(torch.device("cpu"))["host"]
    block = mmap.mmap(-1, 100_000_000)  # pages of its own: an allocator might give out memory that it kept
    np.frombuffer(block, np.uint8).fill(1)
    now = memory_gb(torch.device("cpu"))
    assert now["host"] - before == pytest.approx(0.1, abs=0.02)
    assert now["host_peak"] >= now["host"]
    assert now["host_peak"] <= 1.01 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    block.close()
    later = memory_gb(torch.device("cpu"))
    assert later["host"] - before == pytest.approx(0, abs=0.02)
    assert later["host_peak"] == pytest.approx(now["host_peak"], abs=0.001)


def test_the_peak_is_the_process_own_and_not_that_of_the_one_that_started_it():
    block = np.ones(75_000_000)  # 0.6 GB here, while the other process starts
    use = "from hdm_lightning.training.monitoring.memory_use import memory_gb"
    code = f"import torch; {use}; print(memory_gb(torch.device('cpu')))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    figures = ast.literal_eval(told)
    assert figures["host_peak"] < 1.2 * figures["host"]
    assert memory_gb(torch.device("cpu"))["host_peak"] > 0.6 and block[-1] == 1


def test_data_counts_know_passes_and_different_bad_samples(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    counts = DataCounts(pass_samples=40, quarantine=path)
    assert counts.metrics(10)["seen/quarantined"] == 0
    rows = [{"shard": "a", "key": str(k), "ordinal": k, "reason": "r", "index": i} for i, k in enumerate((1, 2, 2))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts.holes = 3.0
    expected = {"seen/samples": 100, "seen/passes": 2.5, "seen/holes": 3, "seen/quarantined": 2}
    assert counts.metrics(100) == expected


def test_tokens_are_cut_to_the_longest_caption_on_a_cpu():
    tokens, lengths = torch.arange(24).view(2, 12), torch.tensor([3, 5])
    assert torch.equal(fed_tokens(tokens, lengths, static=False), tokens[:, :5])
    assert torch.equal(fed_tokens(tokens, lengths, static=True), tokens)
    assert fed_tokens(tokens.to("meta"), lengths, static=False).shape == (2, 12)


def test_waiting_counts_as_data_time(monkeypatch):
    clock, now = SectionClock(), [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock.end_wait()
    assert clock.drain() == {}
    clock.begin_wait()
    now[0] = 10.25
    clock.end_wait()
    assert clock.drain() == {"data": 0.25}


def test_what_happens_while_the_clock_is_paused_does_not_count(monkeypatch):
    clock, now = SectionClock(), [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock.add("xut", 0.5)
    clock.start("optimizer")
    with clock.paused():
        clock.add("vae", 1.0)
        clock.start("optimizer")
        now[0] += 1.0
        clock.stop("optimizer")
    now[0] += 1.0
    clock.stop("optimizer")
    assert clock.drain() == {"xut": 0.5, "optimizer": 2.0}


def test_time_and_money_of_starts_on_other_numbers_of_devices_at_other_prices(tmp_path, monkeypatch):
    """An hour on four devices at $1, then half an hour on two of them at $3."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    trainer = SimpleNamespace(global_step=3, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    book = Ledger(tmp_path / "ledger.jsonl", writes=True)
    schedule = ScheduleSettings(stages={"px64": stage(micro_batch_size=1, batch_size=4)})
    for devices, price, hours in ((4, 1.0, 1.0), (2, 3.0, 0.5)):
        ledger = KeepLedger(book, plan_stages(schedule, devices)[0], 0, price)
        ledger.on_train_start(trainer, None)
        now[0] += hours * 3600
        assert ledger.stage_seconds() == (3600 if devices == 4 else 5400)
        total = (4, 4) if devices == 4 else (5, 7)
        assert (ledger.device_hours(), ledger.cost_usd()) == pytest.approx(total)
        assert ledger.stage_cost_usd() == pytest.approx(total[1])
        ledger.note("progress", trainer, None)
    assert (book.device_hours_spent(), book.cost_spent_usd()) == pytest.approx((5, 7))
    assert book.cost_spent_usd("px128") == 0
    assert book.events()[-1]["peak_memory_gb"] == pytest.approx(memory_gb(torch.device("cpu"))["host_peak"], abs=0.01)


def test_a_line_is_written_at_least_every_five_minutes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    device = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(global_step=0, max_steps=10_000, should_stop=False, strategy=device)
    (plan,) = plan_stages(ScheduleSettings(stages={"px64": stage()}), 1)
    ledger = KeepLedger(Ledger(tmp_path / "l.jsonl", writes=True), plan, 0, 0.0)
    ledger.on_train_start(trainer, None)
    for step in range(1, 100):
        now[0] += 10.0
        ledger.on_step_end(trainer, None, step)
    assert [event["seconds"] for event in ledger.ledger.events() if event["event"] == "progress"] == [300, 300, 300]


def stage(**changes):
    values = {"resolution": 64, "samples": 1000, "batch_size": 10, "micro_batch_size": 5, "learning_rate": 1.0}
    return StageSettings(**{**values, **changes})


@pytest.mark.parametrize(("price", "spent"), [(3.0, "$1.50"), (0.0, "0.50 device-hours")])
def test_the_progress_line_says_what_is_left_and_spent(tmp_path, monkeypatch, price, spent):
    plan = plan_stages(ScheduleSettings(stages={"px64": stage(), "px128": stage(samples=500)}), 2)[0]
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    text = io.StringIO()
    ledger = KeepLedger(Ledger(tmp_path / "ledger.jsonl", writes=True), plan, 0, price)
    console = Console(file=text, width=200)
    bar = progress.ShowProgress(plan, 2000.0, ledger, SimpleNamespace(latest={"loss/train": 0.5}), console)
    bar.on_train_start(SimpleNamespace(global_step=0), None)
    now[0] += 900.0
    bar.on_step_end(None, None, 25)
    rate = 250 / 900  # 750 samples are left here, 2000 more after this stage
    left, everything = progress.duration(750 / rate), progress.duration(2750 / rate)
    assert (left, everything) == ("45:00", "2:45:00")
    line = f"px64: 250/1,000 samples · 0.3 images/s · loss 0.5000 · left {left} (all {everything}) · {spent}\n"
    assert text.getvalue() == line


def test_settings_are_flattened_without_what_says_nothing_about_the_run():
    config = {"seed": 1, "run_dir": "x", "model": {"width": 8, "skips": "last"}, "logger": {"every_steps": 1}}
    stages = {"px64": {"samples": 100, "save_every": 10}}
    flat = flat_settings({**config, "betas": [0.9, 0.98], "init": None, "schedule": {"stages": stages}})
    assert flat == {"seed": 1, "model.width": 8, "model.skips": "last", "betas": "[0.9, 0.98]", "init": "null"} | {
        "schedule.stages.px64.samples": 100
    }
