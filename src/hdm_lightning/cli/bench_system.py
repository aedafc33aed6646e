"""`hdm-bench system`: the machine's own rates, and what binds in a schedule on it."""

import argparse
import os
from dataclasses import replace
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich.console import Console

from hdm_lightning.benchmarks import system
from hdm_lightning.benchmarks.machine import describe_machine
from hdm_lightning.benchmarks.record import Measurement, Record
from hdm_lightning.benchmarks.settings import CaseSettings
from hdm_lightning.benchmarks.timing import Timing
from hdm_lightning.cli.bench_part import check_counts, print_record
from hdm_lightning.cli.hydra_app import short_name
from hdm_lightning.cli.plan_job import PlanResult, run_plan
from hdm_lightning.data.benchmark import SIZES, benchmark_images, measure_decoding
from hdm_lightning.errors import UserError
from hdm_lightning.precision import default_dtype, dtype_name, half_dtype

_MATMUL = {"cuda": 8192, "cpu": 1536}
_MIB = {"cuda": 1024, "cpu": 256}
# Presets of `text_encoder` that the models' context is made for.
_TEXT_ENCODERS = {
    "xut_small": "gemma3_270m",
    "xut_base": "qwen3_0.6b",
    "xut_large": "gemma3_1b",
    "xut_tiny": "minilm",
    "xut_demo": "minilm",
}
_DECODING = "decoding, one core"
_DECODED_PX = 512


def bench_system(given: argparse.Namespace) -> Record:
    """Measure, print, and write what was asked for."""
    check_counts(given)
    if given.threads:
        torch.set_num_threads(given.threads)
    if not given.disk.is_dir():
        raise UserError(f"there is no folder {str(given.disk)!r}", where="--disk", hint="give an existing folder")
    device = CaseSettings(device=given.device).checked().torch_device
    if given.schedule:
        _check_schedule(given, device)
    size, mib = given.matmul or _MATMUL[device.type], given.mib or _MIB[device.type]
    measured = [*_rates(device, size, mib, given), *_links(given, mib), *([_decoding()] if given.schedule else [])]
    settings = {"matmul": size, "mib": mib, "repeats": given.repeats}
    record = Record("system", describe_machine(device), settings, tuple(measured))
    print_record(record)
    if given.schedule:
        values = {each.name: dict(each.values) for each in measured}
        record = replace(record, findings={f"schedule {given.schedule}": _binding(given, values, device)})
    if given.out is not None:
        record.write(given.out)
    return record


def _rates(device: torch.device, size: int, mib: int, given: argparse.Namespace) -> list[Measurement]:
    result = []
    for dtype in (torch.float32, half_dtype(device) if device.type == "cuda" else torch.bfloat16):
        timing, rate = system.matmul(device, dtype, size, repeats=given.repeats)
        name = f"matmul {dtype_name(dtype)}"
        result.append(Measurement(name, timing, flops=2.0 * size**3, values={"tflop_per_s": rate / 1e12}))
    timing, rate = system.memory_bandwidth(device, mib=mib, repeats=given.repeats)
    result.append(Measurement("memory copy", timing, values={"gb_per_s": rate / 1e9}))
    for name, (timing, rate) in system.disk(given.disk, mib=mib, repeats=min(3, given.repeats)).items():
        result.append(Measurement(f"disk {name}", timing, values={"mb_per_s": rate / 1e6}))
    return result


def _links(given: argparse.Namespace, mib: int) -> list[Measurement]:
    result = []
    between = system.device_to_device(mib=mib, repeats=given.repeats)
    if between is not None:
        result.append(Measurement("GPU to GPU", between[0], values={"gb_per_s": between[1] / 1e9}))
    processes = given.processes or torch.cuda.device_count()
    if processes >= 2:
        timing, rate = system.all_reduce(processes, mib=mib, repeats=given.repeats)
        values = {"bus_gb_per_s": rate / 1e9, "processes": processes}
        result.append(Measurement("all-reduce", timing, values=values))
    return result


def _decoding() -> Measurement:
    """What one core decodes, resizes and crops at a resolution in the middle of the schedules'."""
    speed = measure_decoding(_DECODED_PX, images=benchmark_images(len(SIZES)), repeats=3)
    megapixels = sum(height * width for height, width in SIZES) / len(SIZES) / 1e6
    values = {"mpx_per_s": speed.ours * megapixels, "resolution": _DECODED_PX}
    return Measurement(_DECODING, Timing((1 / speed.ours,)), values=values)


def _check_schedule(given: argparse.Namespace, device: torch.device) -> None:
    """Plan once on some GPU, so that what is wrong with the schedule is told before minutes of measuring.

    Raises:
        UserError: there is no such schedule or model, they do not fit each other, or another device is measured than
            the one that would train.
    """
    if device.type == "cpu" and torch.cuda.is_available():
        raise UserError(
            "a schedule is planned for the GPUs at hand, while the CPU is to be measured",
            where="--device",
            hint="leave --device out, or --schedule",
        )
    try:
        _planned([*_chosen(given), f"gpus={max(1, torch.cuda.device_count())}x5090"])
    except HydraException as error:
        what, where = " ".join(str(error).split()), "--schedule, --model, --text-encoder"
        raise UserError(what, where=where, hint="choose one that there is") from error


def _chosen(given: argparse.Namespace) -> list[str]:
    text = given.text_encoder or _TEXT_ENCODERS.get(given.model, _TEXT_ENCODERS["xut_base"])
    return [f"schedule={given.schedule}", f"model={given.model}", f"text_encoder={text}"]


def _planned(overrides: list[str]) -> PlanResult:
    OmegaConf.register_new_resolver("hdm.short", short_name, replace=True)
    with initialize_config_module("hdm_lightning.conf", version_base="1.3"):
        config = compose("plan", overrides=overrides)
    return run_plan(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]


def _binding(given: argparse.Namespace, measured: dict[str, dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Plan the schedule on this machine as measured; print what binds in each stage."""
    half = dtype_name(default_dtype(device))
    overrides = [
        *_chosen(given),
        "gpus=here",
        f"gpu.peak_tflops={measured[f'matmul {half}']['tflop_per_s']}",
        f"gpu.bandwidth_gb_s={measured['memory copy']['gb_per_s']}",
        f"host.disk_mb_s={measured['disk read']['mb_per_s']}",
        f"host.cores={os.cpu_count()}",
        f"host.decode_mpx_per_core_s={measured[_DECODING]['mpx_per_s']}",
    ]
    if "all-reduce" in measured:
        overrides.append(f"gpu.link_gb_s={measured['all-reduce']['bus_gb_per_s']}")
    plan = _planned(overrides)
    result = {
        stage["stage"]["name"]: {
            "binds": stage["binds"],
            "hours": stage["hours"],
            "images_per_s": stage["images_per_s"],
        }
        for stage in plan.content["stages"]
    }
    for name, values in result.items():
        Console().print(f"{given.schedule}, {name}: {values['binds']} binds, {values['images_per_s']:.2f} images/s")
    return result
