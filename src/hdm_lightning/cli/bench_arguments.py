"""The arguments of hdm-bench, and what they say; nothing slow to import."""

import argparse
from pathlib import Path

_DESCRIPTION = """Measure the machine and the parts of a training step: warm-up, repeats, median and quartiles.

Parts run at their true sizes with random weights, so that nothing is downloaded: XUT-small, -base and -large with
the text encoders they are made for and the SDXL autoencoder. --size tiny is for a quick look."""

_EXAMPLES = """examples:
  hdm-bench system --out experiments/benchmarks/system.json
  hdm-bench system --schedule paper
  hdm-bench data /my/shards --resolution 256 512 --workers 4
  hdm-bench step --size xut_base --resolution 256 --batch 32 --compile
  hdm-bench xut --size xut_base --batch 32 --against compile=true
  hdm-bench vae --resolution 512 --batch 8 --against dtype=float16
"""

_PARTS = {
    "vae": "the autoencoder: --mode encode (default) or decode",
    "text": "the text encoder on captions that fill the context",
    "xut": "the network: --mode train (forward and backward pass, default) or forward",
    "step": "a whole training step: encoders, network, backward pass, optimizer, average",
    "sample": "pictures from prompts: text encoder, guided solver steps, decoding",
}


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    command = argparse.ArgumentParser(
        prog="hdm-bench",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = command.add_subparsers(dest="part", required=True, metavar="PART")
    _add_system(parts.add_parser("system", help="matrix products, memory, disk, links between GPUs"))
    _add_data(parts.add_parser("data", help="the loading of training samples from shards"))
    for name, text in _PARTS.items():
        _add_part(parts.add_parser(name, help=text, description=text), name)
    return command


def _add_common(command: argparse.ArgumentParser, *, repeats: int) -> None:
    command.add_argument("--warmup", type=int, default=2, metavar="N", help="calls before the clock runs (default: 2)")
    command.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"timed calls (default: {repeats})")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")
    command.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    command.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")


def _add_part(command: argparse.ArgumentParser, name: str) -> None:
    _add_common(command, repeats=10)
    command.add_argument("--size", default="xut_base", help="xut_small, xut_base (default), xut_large or tiny")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="samples at once (default: 1)")
    command.add_argument(
        "--dtype",
        default="auto",
        help="float32, bfloat16, float16 (default: on CUDA bfloat16 if it has it)",
    )
    if name != "text":
        command.add_argument("--resolution", type=int, default=0, metavar="PX", help="of the images (default: 256)")
    if name in ("vae", "xut"):
        command.add_argument("--mode", default="", help="encode or decode; train or forward")
    if name != "vae":
        command.add_argument(
            "--context", dest="context_length", type=int, default=256, metavar="N", help="caption tokens (default: 256)"
        )
    if name in ("xut", "step"):
        command.add_argument("--checkpointing", action="store_true", help="recompute activations")
        command.add_argument(
            "--routing-rate", type=float, default=0.5, metavar="R", help="image tokens that skip the U (default: 0.5)"
        )
    if name in ("xut", "step", "sample"):
        command.add_argument("--compile", action="store_true", help="compile the network")
    if name == "sample":
        command.add_argument("--steps", type=int, default=20, metavar="N", help="solver steps (default: 20)")
        command.add_argument(
            "--guidance", dest="guidance_scale", type=float, default=3.0, metavar="S", help="1 is none (default: 3)"
        )
    command.add_argument(
        "--against", metavar="KEY=VALUE", help="time a second setting in turn with the first, e.g. compile=true"
    )


def _add_system(command: argparse.ArgumentParser) -> None:
    _add_common(command, repeats=10)
    command.add_argument("--matmul", type=int, default=0, metavar="N", help="side of the matrices (default: by device)")
    command.add_argument("--disk", type=Path, default=Path(), metavar="DIR", help="folder on the disk to measure")
    command.add_argument("--mib", type=int, default=0, metavar="N", help="size of copies and of the file, 2^20 bytes")
    command.add_argument("--processes", type=int, default=0, metavar="N", help="of the all-reduce (default: GPUs)")
    command.add_argument("--schedule", metavar="NAME", help="name what binds in this schedule on this machine")
    command.add_argument("--model", default="xut_base", metavar="NAME", help="for --schedule (default: xut_base)")
    command.add_argument("--text-encoder", metavar="NAME", help="for --schedule (default: what the model is made for)")


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("shards", nargs="?", metavar="SHARDS", help="folder of shards whose loading is timed as well")
    command.add_argument(
        "--resolution", type=int, nargs="+", default=[256], metavar="PX", help="sides of the crops (default: 256)"
    )
    command.add_argument("--batch", type=int, default=32, metavar="N", help="samples at once (default: 32)")
    command.add_argument("--batches", type=int, default=20, metavar="N", help="batches of a repeat (default: 20)")
    command.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: 0)")
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="(default: 5)")
    command.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    command.set_defaults(warmup=0)
