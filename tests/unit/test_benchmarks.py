"""Timing, comparison, settings and records of benchmarks."""

import json
import time

import pytest
import torch

from hdm_lightning.cli.command import show_report
from hdm_lightning.errors import UserError
from hdm_lightning.profiling import system
from hdm_lightning.profiling.cases import SIZES, Case, peak_bytes, random_network, size_of
from hdm_lightning.profiling.encoder_costs import TextArchitecture
from hdm_lightning.profiling.system import cpu_name, describe_machine
from hdm_lightning.profiling.timing import Timing, compare, measurement, record, report, time_call, time_in_turn
from hdm_lightning.whole_files import write_json

CPU = torch.device("cpu")


def test_medians_and_quartiles():
    timing = Timing((3.0, 1.0, 2.0, 5.0, 4.0))
    assert (timing.median, timing.quartiles, timing.best) == (3.0, (2.0, 4.0), 1.0)
    assert timing.spread == pytest.approx(2 / 3)
    assert Timing((2.0,)).quartiles == (2.0, 2.0)


def test_time_is_measured_after_the_warm_up():
    calls = []

    def call():
        calls.append(len(calls))
        time.sleep(0.2 if len(calls) <= 2 else 0.02)

    timing = time_call(call, CPU, warmup=2, repeats=3)
    assert len(calls) == 5
    assert len(timing.seconds) == 3
    assert 0.02 <= timing.median < 0.2


def test_two_calls_take_turns():
    order = []
    timings = time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, warmup=1, repeats=3)
    assert order == ["a", "b", *"abbaab"]  # turned around in every other round
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match="repeats"):
        time_in_turn({"a": list}, CPU, repeats=0)


def test_a_comparison_is_of_rounds_so_that_drift_cancels():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    first, second = Timing(tuple(drift)), Timing(tuple(0.9 * value for value in drift))
    compared = compare(first, second)
    assert compared.ratio == pytest.approx(0.9)
    assert compared.interval == (pytest.approx(0.9), pytest.approx(0.9))
    assert (compared.second_faster, compared.rounds) == (5, 5)


def test_a_machine_that_slows_down_favours_neither_of_two_calls(monkeypatch):
    clock = {"now": 0.0, "calls": 0}

    def call():
        clock["calls"] += 1
        clock["now"] += 1.01 ** clock["calls"]  # each call takes a hundredth longer than the one before

    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])
    compared = compare(*time_in_turn({"a": call, "b": call}, CPU, repeats=10).values())
    assert compared.ratio == pytest.approx(1, abs=1e-4)
    assert compared.second_faster == 5


def test_the_interval_of_a_comparison_covers_the_true_ratio():
    generator, hits = torch.Generator().manual_seed(0), 0
    for trial in range(60):
        noise = torch.randn(2, 15, generator=generator).mul(0.1).exp()
        low, high = compare(
            Timing(tuple(noise[0].tolist())), Timing(tuple((0.8 * noise[1]).tolist())), seed=trial
        ).interval
        hits += low <= 0.8 <= high
    assert hits >= 51  # 95% of 60 is 57; below 51 has a probability under one in a hundred


def test_sizes_pair_networks_with_encoders_of_their_width():
    for name, size in SIZES.items():
        assert TextArchitecture.from_config(size.text).width == size.network.context_width, name
        assert size.autoencoder["latent_channels"] == size.network.channels
    with pytest.raises(UserError):
        size_of("base")


def test_no_parameter_of_a_random_network_is_all_zero():
    network = random_network(SIZES["tiny"].network)
    assert all(parameter.any() for parameter in network.parameters())


def test_the_peak_of_one_of_two_cases_leaves_the_other_s_tensors_out(monkeypatch):
    own, other = torch.ones(100), torch.ones(1000)

    def case(*tensors):
        return Case("a", lambda: None, 1, 0.0, 0.0, lambda: tensors)

    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 4 * (100 + 1000 + 50))
    # A view is no second tensor.
    found = peak_bytes(case(own), torch.device("cuda"), beside=[case(other, other[:7])])
    assert found == 4 * (100 + 50)


def test_a_record_as_json(tmp_path):
    row = measurement("xut", Timing((2.0, 4.0)), samples=6, flops=6e12, model_flops=3e12, peak_flops=2e12)
    write_json(tmp_path / "new" / "record.json", record("xut", {"cpu": "some"}, {"batch": 6}, [row]))
    (result,) = json.loads((tmp_path / "new" / "record.json").read_text())["results"]
    assert result["median_s"] == 3.0
    assert result["samples_per_s"] == 2.0
    assert result["tflop_per_s"] == 2.0
    assert result["mfu"] == 0.5
    assert "peak_memory_gib" not in result
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["record.json"]


def test_the_machine_s_description_names_no_host_and_no_path():
    text = json.dumps(describe_machine(CPU))
    assert cpu_name() in text
    assert "/" not in text.replace(json.dumps(cpu_name()), "")


def test_rates_of_the_machine(tmp_path):
    timing, rate = system.matmul(CPU, torch.float32, 128, repeats=3)
    assert rate == pytest.approx(2 * 128**3 / timing.median)
    timing, rate = system.memory_bandwidth(CPU, mib=4, repeats=3)
    assert rate == pytest.approx(2 * 4 * 2**20 / timing.median)
    both = system.disk(tmp_path, mib=16, repeats=2)
    assert both["read"][1] == pytest.approx(16 * 2**20 / both["read"][0].median)
    assert set(both) == {"read", "write"}
    assert not list(tmp_path.iterdir())
    assert system.device_to_device() is None or torch.cuda.device_count() > 1


@pytest.mark.parametrize("peak", [0.0, 1e15])
def test_a_gpu_of_unknown_peak_rate_is_told_where_mfu_lacks(peak, capsys):
    row = measurement("xut", Timing((1.0, 1.0, 1.0)), samples=8, flops=2e12, model_flops=1e12, peak_flops=peak)
    show_report(report(record("xut", {"gpu": "Abacus 9", "cpu": "x"}, {}, [row])), {}, None)
    told = capsys.readouterr().out
    assert ("0.1%" in told) == bool(peak) and ("no useful MFU" in told) != bool(peak)
