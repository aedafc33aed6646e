"""Benchmark every part on the CPU of this machine: python experiments/benchmarks/run_cpu.py [NAME …] [--out FOLDER].

Each command writes a JSON file into cpu/; table.py makes README.md's table from them. Keep the machine idle meanwhile.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Small images and short captions: a core does about 0.05 TFLOP/s, a training step at full size is 1.3 TFLOP.
_SMALL = ("--device", "cpu", "--size", "xut_small", "--warmup", "1", "--repeats", "5")
_PICTURE = ("--resolution", "128")
_CAPTION = ("--context", "64")

COMMANDS: dict[str, tuple[str, ...]] = {
    "system": ("system", "--device", "cpu", "--matmul", "1536", "--mib", "256", "--disk", str(HERE)),
    "data": ("data", "--resolution", "256", "512", "--repeats", "50"),
    "vae_encode": ("vae", *_SMALL, *_PICTURE, "--mode", "encode"),
    "vae_decode": ("vae", *_SMALL, *_PICTURE, "--mode", "decode"),
    "text": ("text", *_SMALL, *_CAPTION, "--batch", "4"),
    "xut_forward": ("xut", *_SMALL, *_PICTURE, *_CAPTION, "--mode", "forward"),
    "xut_train": ("xut", *_SMALL, *_PICTURE, *_CAPTION, "--mode", "train"),
    "xut_checkpointing": ("xut", *_SMALL, *_PICTURE, *_CAPTION, "--against", "checkpointing=true"),
    "step": ("step", *_SMALL, *_PICTURE, *_CAPTION),
    "sample": ("sample", *_SMALL, *_PICTURE, *_CAPTION, "--steps", "4"),
}
"""Arguments of hdm-bench by file name."""


def main() -> int:
    """Run the named benchmarks, or all, one after the other; return the exit status of the first that fails."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(COMMANDS)} (default: all)")
    arguments.add_argument(
        "--out", type=Path, default=HERE / "cpu", metavar="FOLDER", help="(default: cpu/ beside this file)"
    )
    given = arguments.parse_args()
    unknown = sorted(set(given.names) - set(COMMANDS))
    if unknown:
        arguments.error(f"no benchmark is called {unknown[0]!r}; known: {', '.join(COMMANDS)}")
    for name in given.names or COMMANDS:
        command = [*COMMANDS[name], "--out", str(given.out / f"{name}.json")]
        print("hdm-bench", *command, flush=True)
        code = "import sys; from hdm_lightning.cli.bench import main; sys.exit(main())"
        status = subprocess.run([sys.executable, "-c", code, *command], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
