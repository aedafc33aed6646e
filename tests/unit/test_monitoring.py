"""Throughput, memory, data counts, the progress line and the settings' row, against numbers computed apart."""

import ast
import mmap
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.routing import random_keep
from hdm_lightning.profiling.operations import training_flops
from hdm_lightning.training.callbacks import throughput
from hdm_lightning.training.callbacks.progress_bar import duration, fitting
from hdm_lightning.training.callbacks.throughput import memory_gb, peak_tflops, restart_peak, stage_flops
from hdm_lightning.training.loggers import VAE_LAYOUT, flat_settings, flow_layout
from hdm_lightning.training.modules.flow_step import fed_tokens
from hdm_lightning.training.stages import StageSettings

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
    required = {"samples": 1, "batch_size": 1, "micro_batch_size": 1, "learning_rate": 1.0}
    stage = StageSettings(resolution=64, routing_rate=0.5, context_length=6, **required)
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


def test_the_peak_of_a_device_is_that_of_the_fit(monkeypatch):
    """Not that of an earlier stage in the same process."""
    devices = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", devices.append)
    for begun in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda begun=begun: begun)
        for name in ("cpu", "cuda:1"):
            restart_peak(torch.device(name))
    assert devices == [torch.device("cuda:1")]


def test_the_peak_is_the_process_own_and_not_that_of_the_one_that_started_it():
    block = np.ones(75_000_000)  # 0.6 GB here, while the other process starts
    use = "from hdm_lightning.training.callbacks.throughput import memory_gb"
    code = f"import torch; {use}; print(memory_gb(torch.device('cpu')))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    figures = ast.literal_eval(told)
    assert figures["host_peak"] < 1.2 * figures["host"]
    assert memory_gb(torch.device("cpu"))["host_peak"] > 0.6 and block[-1] == 1


def test_tokens_are_cut_to_the_longest_caption_on_a_cpu():
    tokens, lengths = torch.arange(24).view(2, 12), torch.tensor([3, 5])
    assert torch.equal(fed_tokens(tokens, lengths, static=False), tokens[:, :5])
    assert torch.equal(fed_tokens(tokens, lengths, static=True), tokens)
    assert fed_tokens(tokens.to("meta"), lengths, static=False).shape == (2, 12)


def test_settings_are_flattened_without_what_says_nothing_about_the_run():
    config = {"seed": 1, "run_dir": "x", "model": {"width": 8, "skips": "last"}, "trainer": {"devices": 1}}
    stages = {"px64": {"samples": 100, "save_every": 10}}
    flat = flat_settings({**config, "betas": [0.9, 0.98], "init": None, "schedule": {"stages": stages}})
    assert flat == {"seed": 1, "model.width": 8, "model.skips": "last", "betas": "[0.9, 0.98]", "init": "null"} | {
        "schedule.stages.px64.samples": 100
    }


def test_charts_of_an_autoencoder_and_of_a_network_below_one_folder_are_apart():
    """TensorBoard joins categories of one title, and takes in every tag that a pattern matches from its beginning."""
    network = flow_layout(8)
    assert not set(network) & set(VAE_LAYOUT)

    def shown(chart, tags):
        _, patterns = chart
        return [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]

    terms = VAE_LAYOUT["Autoencoder: is it learning?"]["training: loss terms"]
    assert shown(terms, ["train/loss", "train/loss_mean", "train/kl"]) == ["train/kl"]
    rate = network["Is it learning?"]["learning rate"]
    assert shown(rate, ["lr", "lr-AdamW/pg1"]) == ["lr"]
    evaluated = ["evaluation/loss/flow_loss", "evaluation/loss/flow_loss/low"]
    assert not any(
        shown(chart, evaluated) for page in (network, VAE_LAYOUT) for each in page.values() for chart in each.values()
    )


def test_the_line_beside_the_bar_fits_and_keeps_the_samples():
    parts = {"samples": "152,480,000/152,480,000 samples", "speed": "308.9 images/s", "loss": "loss 0.5432"}
    parts |= {"left": "137 h left, 352 h for all stages", "spent": "$526.50"}
    whole = fitting(parts, 200)
    assert whole.split(" · ") == list(parts.values())
    widths = [len(fitting(parts, width)) for width in range(31, 120)]
    assert all(length <= width for length, width in zip(widths, range(31, 120), strict=True))
    assert widths == sorted(widths) and len(set(widths)) == 5
    assert fitting(parts, 5) == parts["samples"]


def test_durations_in_two_or_three_digits():
    assert [duration(seconds) for seconds in (0, 99, 100, 5900, 6000, 35_000, 36_000, 3600 * 352)] == [
        *("0 s", "99 s", "2 min", "98 min", "1 h 40 min", "9 h 43 min", "10 h", "352 h")
    ]
