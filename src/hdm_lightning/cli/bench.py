"""`hdm-bench`: how fast the machine, each part and the whole training step are."""

import sys
from collections.abc import Sequence

from hdm_lightning.cli.bench_arguments import parser
from hdm_lightning.cli.errors import run_command
from hdm_lightning.cli.outputs import require_file


def main() -> None:
    """Entry point."""
    sys.exit(run_command(bench))


def bench(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, print it and write it."""
    given = parser().parse_args(arguments)
    if given.out is not None:
        require_file(given.out, "--out")
    if given.part == "data":
        from hdm_lightning.cli.bench_data import bench_data  # noqa: PLC0415 (--help stays quick)

        bench_data(given)
    elif given.part == "system":
        from hdm_lightning.cli.bench_system import bench_system  # noqa: PLC0415

        bench_system(given)
    else:
        from hdm_lightning.cli.bench_part import bench_part  # noqa: PLC0415

        bench_part(given)
