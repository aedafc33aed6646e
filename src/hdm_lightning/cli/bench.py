"""`hdm-bench`: speed of the machine, of each part and of the whole training step."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hdm_lightning.cli.arguments import Flags, Parser
from hdm_lightning.cli.command import run_command
from hdm_lightning.profiling.bench_settings import CaseSettings, DataSettings, RunSettings, SystemSettings

_DESCRIPTION = """Benchmark the machine and the parts of a training step: warm-up, repeats, median and quartiles.

Parts run at full size with random weights, so nothing is downloaded: XUT-small, -base and -large with their text
encoders and the SDXL autoencoder. --size tiny is for a quick look."""

_EXAMPLES = """examples:
  hdm-bench system --out experiments/benchmarks/system.json
  hdm-bench system --schedule paper
  hdm-bench data /my/shards --resolution 256 512 --workers 4
  hdm-bench step --size xut_base --resolution 256 --batch 32 --compile
  hdm-bench step --size xut_base --batch 32 --compile --caption-tokens 64 --accumulation 16
  hdm-bench step --size xut_base --batch 32 --compile --accumulation 4 --against overlap=true
  hdm-bench step --size xut_base --batch 32 --compile --against latents=true
  hdm-bench xut --size xut_base --batch 32 --against compile=true
  hdm-bench vae --resolution 512 --batch 8 --against dtype=float16
"""


class Part(NamedTuple):
    """A part of a training step, and its settings besides size, batch and dtype."""

    text: str
    settings: tuple[str, ...]


CAPTIONS = ("caption_tokens", "accumulation")

PARTS: Mapping[str, Part] = {
    "vae": Part("the autoencoder: --mode encode (default) or decode", ("resolution", "mode")),
    "text": Part("the text encoder", ("context_length", *CAPTIONS)),
    "xut": Part(
        "the network: --mode train (forward and backward pass, default) or forward",
        ("resolution", "mode", "context_length", *CAPTIONS, "checkpointing", "routing_rate", "compile"),
    ),
    "step": Part(
        "a whole training step: encoders, network, backward pass, optimizer, average",
        ("resolution", "context_length", *CAPTIONS, "checkpointing", "routing_rate", "compile", "latents", "overlap"),
    ),
    "sample": Part(
        "images from prompts: text encoder, guided solver steps, decoding",
        ("resolution", "context_length", "compile", "steps", "guidance_scale"),
    ),
}
RUN = Flags(RunSettings, {"out": "--out FILE"})
CASE = Flags(
    CaseSettings,
    {
        "resolution": "--resolution PX",
        "context_length": "--context N",
        "caption_tokens": "--caption-tokens N",
        "guidance_scale": "--guidance S",
    },
)
SYSTEM = Flags(SystemSettings, {"out": "--out FILE", "disk": "--disk DIR"})
DATA = Flags(DataSettings, {"out": "--out FILE", "shards": "SHARDS", "resolution": "--resolution PX"})


def main() -> None:
    """Entry point."""
    sys.exit(run_command(bench))


def bench(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for; print and write the result."""
    given = parser().parse_args(arguments)
    from hdm_lightning.cli import bench_parts  # noqa: PLC0415 (imports torch; keeps --help fast)

    if given.part == "data":
        bench_parts.bench_data(DATA.read(given))
    elif given.part == "system":
        bench_parts.bench_system(SYSTEM.read(given))
    else:
        first, own = CASE.read(given), case_settings(given.part)
        second = CASE.changed(first, given.against, where="--against", only=own) if given.against else None
        bench_parts.bench_part(given.part, own, RUN.read(given), first, second, given.against)


def case_settings(part: str) -> tuple[str, ...]:
    """Return the names of a part's settings, except the device."""
    return ("size", "batch", "dtype", *PARTS[part].settings)


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    command = Parser(prog="hdm-bench", description=_DESCRIPTION, epilog=_EXAMPLES)
    parts = command.add_subparsers(dest="part", required=True, metavar="PART")
    SYSTEM.add(parts.add_parser("system", help="matrix products, memory, disk, links between GPUs"))
    DATA.add(parts.add_parser("data", help="loading of training samples from shards"))
    for name, part in PARTS.items():
        own = parts.add_parser(name, help=part.text, description=part.text)
        RUN.add(own)
        CASE.add(own, only=(*case_settings(name), "device"))
        help_text = "alternate with a second setting and compare, e.g. compile=true"
        own.add_argument("--against", metavar="KEY=VALUE", help=help_text)
    return command


if __name__ == "__main__":
    main()
