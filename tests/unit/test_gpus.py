"""Names and figures of GPUs, as a command or a driver spells them."""

import pytest

from hdm_lightning.errors import UserError
from hdm_lightning.profiling.gpus import GPUS, find_gpu, nearest_gpu, override, parse_gpus


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("4x5090", "5090", 4),
        ("h100", "h100", 1),
        ("2xRTX 4090", "4090", 2),
        ("8 x NVIDIA A100-SXM4-80GB", "a100-80", 8),
        ("NVIDIA GeForce RTX 3090", "3090", 1),
        ("NVIDIA H100 80GB HBM3", "h100", 1),
        ("NVIDIA H100 PCIe", "h100-pcie", 1),
        ("NVIDIA A100-PCIE-40GB", "a100-40", 1),
        ("NVIDIA A100 80GB PCIe", "a100-80", 1),
        ("NVIDIA A10", "a10", 1),
        ("NVIDIA RTX A6000", "a6000", 1),
        ("NVIDIA GeForce RTX 3090 Ti", "3090ti", 1),
        ("NVIDIA RTX 6000 Ada Generation", "6000ada", 1),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "pro6000", 1),
    ],
)
def test_spellings_of_gpus(text, name, count):
    gpu, found = parse_gpus(text)
    assert (gpu.name, found) == (name, count)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("4x5099", "4x5090"),
        ("h101", "1xh100"),
        ("2x4070", "2x4080"),
        ("8xa100", "8xa100-"),  # which of the two is not said, and an A10 is neither
        ("A10G", "1xa10"),
        ("NVIDIA RTX A1000", "1x"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "1x4090"),
    ],
)
def test_an_unknown_gpu_names_the_nearest(text, near):
    with pytest.raises(UserError) as caught:
        parse_gpus(text)
    assert caught.value.where == "gpus"
    assert near in caught.value.hint


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_a_part_of_a_card_does_not_have_the_figures_of_the_whole(name):
    assert find_gpu(name.partition(" MIG")[0]) is not None and find_gpu(name) is None


def test_names_that_are_none():
    assert find_gpu("abacus") is None
    assert nearest_gpu("abacus") in GPUS
    for text in ("", "0x5090"):
        with pytest.raises(UserError):
            parse_gpus(text)


def test_figures_of_a_gpu_can_be_replaced():
    gpu = override(GPUS["4090"], {"memory_gib": 48, "usd_per_hour": 0, "power_w": None})
    assert (gpu.memory_gib, gpu.usd_per_hour, gpu.power_w, gpu.peak_tflops) == (48, 0, 450, 165.2)
    for changes, word in (({"memry_gib": 1}, "memory_gib"), ({"peak_tflops": -1}, "use one")):
        with pytest.raises(UserError) as caught:
            override(GPUS["4090"], changes)
        assert word in caught.value.hint


def test_geforce_rates_are_the_vendor_s_for_float32_accumulation():
    # Tensor cores x 128 multiply-adds a clock x 2 x boost clock in GHz; float32 accumulation runs at half that rate.
    for name, cores, clock in (("3090", 328, 1.695), ("4090", 512, 2.520), ("5090", 680, 2.407)):
        assert GPUS[name].peak_tflops == pytest.approx(cores * 128 * 2 * clock / 1000 / 2, rel=0.002)
