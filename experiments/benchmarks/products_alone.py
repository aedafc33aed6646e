"""Share of the network's time that its matrix products take by themselves, on a CPU: python products_alone.py.

A forward and a backward pass of XUT-base (float32, two samples of 256 px, 256 text tokens, routed), compared with the
matrix products and the attentions that it calls, one after the other on tensors of the same shapes and layouts. Timed
in turn in one process (A B B A …) on one thread, in CPU time, so other work on the machine matters little.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hdm_lightning.cli.bench_training import BUILDERS
from hdm_lightning.profiling.bench_settings import CaseSettings
from hdm_lightning.profiling.cases import Setup
from hdm_lightning.profiling.system import describe_machine
from hdm_lightning.training.hardware import keep_freed_memory

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)
ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
HERE = Path(__file__).parent

Again = Callable[[], object]


class Recorded(TorchDispatchMode):
    """Records, for every call of some operations, how to repeat it on similar tensors."""

    def __init__(self, *operations: Any) -> None:
        super().__init__()
        self.operations, self.calls = operations, list[Again]()
        self._alike: dict[Any, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a call and make it."""
        if func in self.operations:
            given, named = tree_map_only(torch.Tensor, self._like, (args, kwargs or {}))
            self.calls.append(lambda: func(*given, **named))
        return func(*args, **(kwargs or {}))

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        key = (tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._alike:
            alike = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            self._alike[key] = alike.copy_(tensor)
        return self._alike[key]


def seconds(work: Again) -> float:
    """Return the CPU seconds of a call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE / "cpu" / "products_alone.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    setup = Setup.of(CaseSettings(size="xut_base", batch=2, resolution=256, context_length=256, device="cpu"))
    case = BUILDERS["xut"](setup)
    with Recorded(*PRODUCTS) as products, Recorded(*ATTENTION) as attention:
        case.call()

    def again(calls: list[Again]) -> Again:
        return lambda: [call() for call in calls]

    works = {"whole": case.call, "products": again(products.calls), "attention": again(attention.calls)}
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(given.rounds):
        for name in list(works) if number % 2 else list(works)[::-1]:
            times[name].append(seconds(works[name]))
            print(f"{name}: {times[name][-1]:.2f} s", flush=True)
    shares = {
        name: statistics.median(part / whole for part, whole in zip(times[name], times["whole"], strict=True))
        for name in ("products", "attention")
    }
    medians = {name: statistics.median(each) for name, each in times.items()}
    content = {
        "machine": describe_machine(setup.device),
        "settings": setup.to_json(),
        "calls": {"products": len(products.calls), "attention": len(attention.calls)},
        "flop": case.flops,
        "tflop_per_s": {"whole": case.flops / medians["whole"] / 1e12},
        "median_s": medians,
        "share_of_whole": {**shares, "rest": 1 - sum(shares.values())},
        "seconds": times,
    }
    given.out.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps({key: content[key] for key in ("calls", "median_s", "share_of_whole")}, indent=1))


if __name__ == "__main__":
    main()
