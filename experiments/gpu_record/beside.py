"""Time XUT-base and another network in turn: beside.py FILE OUT SIZE DEVICE.

FILE is Python with a function `build(batch, resolution, context_length, device)` that returns a function, which runs
one forward and backward pass of the other network on such a micro-batch, as its authors would run it.
"""

import json
import runpy
import sys
from pathlib import Path

from hdm_lightning.cli.bench_training import BUILDERS
from hdm_lightning.profiling.bench_settings import CaseSettings
from hdm_lightning.profiling.cases import Setup
from hdm_lightning.profiling.system import describe_machine
from hdm_lightning.profiling.timing import compare, measurement, record, time_in_turn


def main() -> None:
    """Time both, A B B A …, and write the comparison."""
    file, out, size, device = sys.argv[1:]
    cuda = device == "cuda"
    small = {} if cuda else {"resolution": 64, "batch": 2, "context_length": 16}
    given = {"resolution": 256, "batch": 64, "context_length": 256, "compile": cuda, "device": device, "size": size}
    settings = CaseSettings(**(given | small))
    setup = Setup.of(settings)
    ours = BUILDERS["xut"](setup)
    build = runpy.run_path(file)["build"]
    theirs = build(settings.batch, setup.side_px, settings.context_length, device)
    timings = time_in_turn({"ours": ours.call, "other": theirs}, setup.device, warmup=2, repeats=10 if cuda else 2)
    rows = [measurement(name, timing, samples=ours.samples) for name, timing in timings.items()]
    content = record("beside", describe_machine(setup.device), setup.to_json(), rows, compare(*timings.values()))
    Path(out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
