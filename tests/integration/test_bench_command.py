"""Every part of hdm-bench at the tiny size, from the command line to the JSON file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hdm_lightning.cli import bench_parts
from hdm_lightning.cli.bench import bench
from hdm_lightning.cli.bench_training import BUILDERS
from hdm_lightning.errors import UserError
from hdm_lightning.profiling import system
from hdm_lightning.profiling.bench_settings import CaseSettings
from hdm_lightning.profiling.cases import Setup, sampling_flops
from hdm_lightning.profiling.operations import training_flops


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("hdm_lightning.profiling.system.CPU_MATMUL", 64)


def measured(tmp_path, *arguments):
    file = tmp_path / "record.json"
    bench([*arguments, "--device", "cpu", "--repeats", "2", "--out", str(file)])
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    "arguments",
    [
        ["vae"],
        ["vae", "--mode", "decode"],
        ["text", "--context", "16"],
        ["xut", "--context", "16"],
        ["xut", "--mode", "forward", "--context", "16"],
        ["step", "--context", "16", "--checkpointing"],
        ["sample", "--context", "16", "--steps", "2"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_part(tmp_path, arguments):
    record = measured(tmp_path, *arguments, "--size", "tiny", "--batch", "2")
    (result,) = record["results"]
    assert record["benchmark"] == arguments[0]
    assert result["samples_per_s"] == pytest.approx(2 / result["median_s"])
    assert result["tflop_per_s"] == pytest.approx(result["flop"] / result["median_s"] / 1e12)
    assert result["peak_memory_gib"] > 0
    assert "mode" not in record["settings"] or arguments[0] in ("vae", "xut")


@pytest.mark.parametrize("part", ["text", "xut", "step"])
def test_captions_of_many_lengths_count_without_their_padding(tmp_path, part):
    """Four micro-batches of a step: what is computed is counted as padded, MFU and useful rate as the captions are."""
    words = [
        part,
        *["--size", "tiny", "--batch", "2", "--context", "100", "--caption-tokens", "40", "--accumulation", "4"],
    ]
    (row,) = measured(tmp_path, *words)["results"]
    chosen = CaseSettings(size="tiny", batch=2, context_length=100, caption_tokens=40, accumulation=4, device="cpu")
    setup = Setup.of(chosen)
    lengths = [length for each in setup.micro_batches for length in each.lengths]
    assert row["samples"] == len(lengths) == 8 and np.mean(lengths) == pytest.approx(40, rel=0.1)
    assert lengths == sorted(lengths, reverse=True)
    assert [each.padded for each in setup.micro_batches] == [96, 64, 32, 32]
    if part == "text":
        fed, useful = (sum(map(setup.text_cost.flops, each)) for each in ([96, 64, 32, 32] * 2, lengths))
        assert row["flop"] == fed
    else:
        grid = (setup.latent_side, setup.latent_side)
        useful = sum(training_flops(setup.parts.network, grid, length, 0.5) for length in lengths)
        assert row["flop"] > 1.2 * useful
    assert row["useful_tflop_per_s"] == pytest.approx(useful / row["median_s"] / 1e12)
    full = Setup.of(replace(chosen, caption_tokens=0))
    assert full.useful(full.model_flops) == full.fed(full.model_flops) == 8 * full.operations(100).model


def test_a_step_tells_where_its_time_goes(tmp_path):
    (result,) = measured(tmp_path, "step", "--size", "tiny", "--context", "16")["results"]
    assert set(result["sections_share"]) >= {"vae", "text", "xut", "optimizer"}
    assert sum(result["sections_share"].values()) == pytest.approx(1)


def test_two_settings_in_turn(tmp_path):
    small = ("--size", "tiny", "--context", "16", "--batch", "16")
    record = measured(tmp_path, "xut", *small, "--against", "checkpointing=true")
    first, second = record["results"]
    assert second["name"] == "xut train, checkpointing=true"
    assert second["flop"] > first["flop"]
    # On a CPU tensors are counted, not pages of the process: the same bytes however busy the machine is.
    assert second["peak_memory_gib"] < 0.5 * first["peak_memory_gib"]
    assert record["comparison"]["time_ratio"] > 0
    assert record["settings"]["against"] == "checkpointing=true"


def test_calls_before_the_clock_runs_are_chosen_where_they_are_made(monkeypatch, tmp_path):
    asked = []
    real = bench_parts.time_in_turn
    monkeypatch.setattr(bench_parts, "time_in_turn", lambda *a, **k: asked.append(k["warmup"]) or real(*a, **k))
    measured(tmp_path, "vae", "--size", "tiny", "--warmup", "3")
    assert asked == [3]
    with pytest.raises(UserError, match="unknown argument '--warmup'"):
        measured(tmp_path, "system", "--matmul", "64", "--mib", "16", "--disk", str(tmp_path), "--warmup", "3")


def test_checkpointing_is_told_by_operations_at_true_size():
    plain, guided = (Setup.of(CaseSettings(size="xut_base", guidance_scale=g, steps=10)) for g in (1.0, 3.0))
    decode = plain.autoencoder_cost.decode_flops(256, 256)
    assert sampling_flops(guided) - decode == 2 * (sampling_flops(plain) - decode)


def test_the_system_and_what_binds_on_it(tmp_path, capsys):
    record = measured(
        tmp_path, "system", "--matmul", "64", "--mib", "16", "--disk", str(tmp_path), "--schedule", "paper"
    )
    names = [result["name"] for result in record["results"]]
    assert names[:5] == ["matmul float32", "matmul bfloat16", "memory copy", "disk write", "disk read"]
    assert set(record["schedule paper"]) == {"px256", "px512", "px768", "px1024"}
    assert record["schedule paper"]["px256"]["binds"]
    decoding = next(result for result in record["results"] if result["name"] == "decoding, one core")
    assert decoding["mpx_per_s"] == pytest.approx(1.02 / decoding["median_s"], rel=0.02)  # of about a megapixel each
    assert "limited by" in capsys.readouterr().out


def test_a_schedule_for_gpus_is_not_planned_by_the_rates_of_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match="the CPU is to be measured"):
        bench(["system", "--device", "cpu", "--schedule", "paper"])


@pytest.mark.parametrize("model", ["xut_small", "xut_large"])
def test_a_schedule_is_planned_for_other_models_with_their_own_text_encoder(model, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def reached(*arguments, **settings):
        raise InterruptedError

    monkeypatch.setattr(system, "matmul", reached)
    with pytest.raises(InterruptedError):  # the schedule was found good, and measuring began
        bench(["system", "--device", "cpu", "--schedule", "paper", "--model", model])


@pytest.mark.slow
def test_an_all_reduce_over_two_processes():
    timing, rate = system.all_reduce(2, mib=4, repeats=3)
    assert len(timing.seconds) == 3
    assert rate == pytest.approx(4 * 2**20 / timing.median)  # 2·(n − 1)/n is 1 for two
    with pytest.raises(ValueError, match="at least 2"):
        system.all_reduce(1)


def test_loading_and_decoding(tmp_path, tiny_shards):
    from hdm_lightning.data.scanning import index_shards

    index_shards(tiny_shards)
    file = tmp_path / "data.json"
    arguments = ["--resolution", "32", "--repeats", "2", "--batch", "4", "--batches", "2", "--out", str(file)]
    bench(["data", str(tiny_shards), *arguments])
    content = json.loads(file.read_text())
    assert content["decoding"][0]["ours"] > 0
    assert content["loading"][0]["resolution"] == 32
    assert content["loading"][0]["samples_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "where", "hint"),
    [
        (["xut", "--size", "xut_huge"], "--size", "xut_large"),
        (["xut", "--sise", "tiny"], "hdm-bench xut", "--size"),
        (["xut", "--repeats", "0"], "--repeats", "1 or more"),
        (["xut", "--threads", "-1"], "--threads", "0 or more"),
        (["xut", "--batch", "0"], "--batch", "1 or more"),
        (["xut", "--context", "0"], "--context", "1 or more"),
        (["xut", "--routing-rate", "1"], "--routing-rate", "less than 1"),
        (["xut", "--size", "tiny", "--resolution", "70"], "--resolution", "--resolution 64"),
        (["xut", "--dtype", "int8"], "--dtype", "float32"),
        (["vae", "--size", "tiny", "--mode", "sideways"], "--mode", "encode"),
        (["vae", "--size", "tiny", "--device", "abacus"], "--device", "cpu"),
        (["vae", "--size", "tiny", "--device", "meta"], "--device", "cpu"),
        (["vae", "--size", "tiny", "--device", "cuda:01"], "--device", "cpu"),
        (["xut", "--against", "compiel=true"], "--against", "compile"),
        (["xut", "--against", "batch"], "--against", "KEY=VALUE"),
        (["xut", "--against", "batch=many"], "--against", "use one"),
        (["xut", "--against", "compile=perhaps"], "--against", "true or false"),
        (["xut", "--size", "tiny", "--against", "batch=1"], "--against", "different value"),
        (["vae", "--against", "compile=true"], "--against", "choose one of size, batch"),
        (["system", "--disk", "no/such/folder"], "--disk", "existing folder"),
        (["system", "--device", "cpu", "--schedule", "nope"], "--schedule, --model, --text-encoder", "presets"),
        (
            ["system", "--device", "cpu", "--schedule", "paper", "--text-encoder", "minilm"],
            "model.context_width",
            "384",
        ),
        (["data", "--batch", "0"], "--batch", "1 or more"),
        (["vae", "--size", "tiny", "--out", "/"], "--out", "file name"),
        (["data", "--out", "/dev/null/result.json"], "--out", "another path"),
    ],
)
def test_mistakes_are_named(arguments, where, hint, monkeypatch):
    monkeypatch.setattr(system, "matmul", None)  # nothing is measured before they are told
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        bench(arguments)
    assert caught.value.where == where
    assert hint in caught.value.hint


def test_a_step_with_overlapped_encoders_has_the_losses_of_one_without():
    """Three steps of two micro-batches of different lengths, in bfloat16."""
    given = CaseSettings(size="tiny", batch=2, context_length=40, caption_tokens=12, accumulation=2, dtype="bfloat16")
    steps = [
        BUILDERS["step"](Setup.of(replace(given, overlap=overlap, device="cpu"))).call for overlap in (False, True)
    ]
    losses = [[float(step()) for _ in range(3)] for step in steps]
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


def test_a_step_with_latents_from_disk_encodes_no_image(monkeypatch):
    """Nor counts it as work, while the captions are encoded as before."""
    given = Setup.of(CaseSettings(size="tiny", batch=2, context_length=16, device="cpu"))
    cached = Setup.of(replace(given.settings, latents=True))
    encode = given.autoencoder_cost.encode_flops(given.side_px, given.side_px)
    online, latents = BUILDERS["step"](given), BUILDERS["step"](cached)
    assert online.flops - latents.flops == 2 * encode > 0
    assert online.model_flops == latents.model_flops

    def encoded(*arguments, **options):
        raise AssertionError("an image is encoded")

    monkeypatch.setattr("hdm_lightning.encoders.autoencoder.KLAutoencoder.moments", encoded)
    assert torch.isfinite(latents.call())
    assert latents.values()["sections_share"]["text"] > 0
    with pytest.raises(AssertionError, match="an image is encoded"):
        online.call()
