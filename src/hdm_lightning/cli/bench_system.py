"""`hdm-bench system`: the machine's own rates, and what binds in a schedule on it."""

import argparse
import os
from dataclasses import replace
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from hdm_lightning.benchmarks import system
from hdm_lightning.benchmarks.machine import describe_machine
from hdm_lightning.benchmarks.record import Measurement, Record
from hdm_lightning.benchmarks.settings import CaseSettings
from hdm_lightning.cli.bench_part import check_counts, print_record
from hdm_lightning.cli.hydra_app import short_name
from hdm_lightning.cli.plan_job import run_plan
from hdm_lightning.errors import UserError

_MATMUL = {"cuda": 8192, "cpu": 1536}
_MIB = {"cuda": 1024, "cpu": 256}


def bench_system(given: argparse.Namespace) -> Record:
    """Measure, print, and write what was asked for."""
    check_counts(given)
    if given.threads:
        torch.set_num_threads(given.threads)
    if not given.disk.is_dir():
        raise UserError(f"there is no folder {str(given.disk)!r}", where="--disk", mend="give an existing folder")
    device = CaseSettings(device=given.device).checked().torch_device
    size, mib = given.matmul or _MATMUL[device.type], given.mib or _MIB[device.type]
    measured = [*_rates(device, size, mib, given), *_links(given, mib)]
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
    for dtype in (torch.float32, torch.bfloat16):
        timing, rate = system.matmul(device, dtype, size, repeats=given.repeats)
        name = f"matmul {str(dtype).removeprefix('torch.')}"
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


def _binding(given: argparse.Namespace, measured: dict[str, dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Plan the schedule on this machine as measured; print what binds in each stage."""
    half = "bfloat16" if device.type == "cuda" else "float32"
    overrides = [
        f"schedule={given.schedule}",
        f"model={given.model}",
        "gpus=here",
        f"gpu.peak_tflops={measured[f'matmul {half}']['tflop_per_s']}",
        f"gpu.bandwidth_gb_s={measured['memory copy']['gb_per_s']}",
        f"host.disk_mb_s={measured['disk read']['mb_per_s']}",
        f"host.cores={os.cpu_count()}",
    ]
    if "all-reduce" in measured:
        overrides.append(f"gpu.link_gb_s={measured['all-reduce']['bus_gb_per_s']}")
    OmegaConf.register_new_resolver("hdm.short", short_name, replace=True)
    with initialize_config_module("hdm_lightning.conf", version_base="1.3"):
        config = compose("plan", overrides=overrides)
    plan = run_plan(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
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
