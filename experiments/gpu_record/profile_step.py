"""Profile the kernels of a compiled training step: profile_step.py FOLDER SIZE DEVICE writes profile.{txt,json}."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hdm_lightning.cli.bench_training import step_case
from hdm_lightning.profiling.bench_settings import CaseSettings
from hdm_lightning.profiling.cases import Setup


def main() -> None:
    """Time a few steps, then profile one."""
    folder, size, device = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    cuda = device == "cuda"
    sync = torch.cuda.synchronize if cuda else lambda: None
    small = {} if cuda else {"resolution": 64, "batch": 2, "context_length": 16}
    given = {"resolution": 256, "batch": 64, "context_length": 256, "compile": cuda, "device": device, "size": size}
    case = step_case(Setup.of(CaseSettings(**(given | small))))
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        case.call()
        sync()
        seconds.append(time.perf_counter() - begin)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as taken:
        case.call()
        sync()
    row = {"first_call_s": seconds[0], "step_s": statistics.median(seconds[2:]), "samples": case.samples}
    (folder / "profile.json").write_text(json.dumps(row, indent=1) + "\n")
    spent = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [each for each in taken.key_averages() if not cuda or each.device_type == DeviceType.CUDA]
    rows.sort(key=lambda each: -getattr(each, spent))
    whole = sum(getattr(each, spent) for each in rows) or 1
    lines = [f"all together {whole / 1e3:.1f} ms", ""]
    for each in rows[:80]:
        own = getattr(each, spent)
        lines.append(f"{own / 1e3:9.2f} ms {100 * own / whole:5.1f}% {each.count:6d}x  {each.key[:150]}")
    (folder / "profile.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
