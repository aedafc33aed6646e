"""Write the table of README.md from the folders beside it: python experiments/benchmarks/table.py."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run_cpu import COMMANDS

HERE = Path(__file__).parent
GPU_PARTS = ("network", "short_text", "beside", "step", "network_512", "network_1024", "overlap", "cached")
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
_RATES = (("samples_per_s", "samples/s"), ("gb_per_s", "GB/s"), ("mb_per_s", "MB/s"))


def rows_of(file: Path) -> Iterator[list[str]]:
    """Yield a row for each measurement of a file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["benchmark"] == "data":
        for each in content["decoding"]:
            pixels, rate = each["resolution"], each["ours"]
            yield [f"decoding to {pixels} px, one core", "", "", f"{rate:.0f} images/s", "", ""]
        return
    for result in content["results"]:
        yield _row(result)


def _row(result: dict[str, Any]) -> list[str]:
    low, high = (f"{1000 * second:.1f}" for second in result["quartiles_s"])
    rate = next((f"{_three_digits(result[key])} {unit}" for key, unit in _RATES if key in result), "")
    flops = f"{result['tflop_per_s']:.3f}" if "tflop_per_s" in result else ""
    memory = f"{result['peak_memory_gib']:.2f}" if "peak_memory_gib" in result else ""
    return [result["name"], f"{1000 * result['median_s']:.1f}", f"{low} … {high}", rate, flops, memory]


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table(files: list[Path]) -> str:
    """Return a machine and the table of its measurements."""
    machine = json.loads(files[0].read_text(encoding="utf-8"))["machine"]
    header = ["", "median, ms", "quartiles, ms", "rate", "TFLOP/s", "peak, GiB"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(row for file in files for row in rows_of(file))]
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items() if value)
    return f"{facts}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables() -> str:
    """Return the tables of the CPU, then of each GPU, or what to run if there are none."""
    cpu = [file for name in COMMANDS if (file := HERE / "cpu" / f"{name}.json").exists()]
    missing = "Not measured yet: `python experiments/benchmarks/run_cpu.py` on a quiet machine."
    parts = [table(cpu) if cpu else missing]
    for folder in sorted(file.parent for file in HERE.glob("*/record.json")):
        found = [folder / f"{name}.json" for name in GPU_PARTS]
        parts += [f"### {folder.name}", table([file for file in found if file.exists()]), rates(folder / "train.json")]
    if not list(HERE.glob("*/record.json")):
        parts.append("GPU: not measured (`make gpu-record` writes a folder for each kind).")
    return "\n\n".join(filter(None, parts))


def rates(file: Path) -> str:
    """Return the training rates of the real command, a line per fit."""
    fits = json.loads(file.read_text(encoding="utf-8"))["fits"] if file.exists() else []
    lines = [
        f"- `hdm-train`, {fit['stage']}: {fit['images_per_s']:.0f} images/s over {fit['over_s']:.0f} s, "
        f"first step after {fit['first_step_s']:.0f} s"
        for fit in fits
        if "images_per_s" in fit
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the tables into README.md."""
    file = HERE / "README.md"
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    file.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
