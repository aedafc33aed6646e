"""Measure everything that needs a GPU in one go: python experiments/gpu_record/record.py [PART …] [--out FOLDER].

Parts run in order, each in its own process with a time limit, and each writes its results before the next begins, so
losing the machine does not lose what was measured: `record.json` (what ran, how long, with which status), `PART.json`
or `PART.log` of each. `--tiny` runs all of them at tiny sizes on a CPU.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "experiments" / "benchmarks"
DRAWINGS = ROOT / "data" / "openclipart-mini"
STEPS = "steps.jsonl"
RATE_S = 90.0
"""Duration of the real command's first stage, without compilation."""
COMPILE_S = 30.0
LEFT_OUT = "left out: no --published"
GRACE_S = 20.0
"""Seconds that a process may take to save and end after SIGTERM."""


@dataclass(frozen=True)
class Session:
    """Settings that the parts share."""

    out: Path  # results
    work: Path  # everything else
    tiny: bool  # on a CPU, at sizes that take seconds
    published: Path | None = None  # builds another network to time next to this one; see beside.py

    @property
    def device(self) -> str:
        """Device of every part."""
        return "cpu" if self.tiny else "cuda"

    @property
    def patience(self) -> int:
        """Factor on a part's time limit: tiny ones only show that they run, on however busy a machine."""
        return 6 if self.tiny else 1

    @property
    def size(self) -> str:
        """Name of the network's size in hdm-bench."""
        return "tiny" if self.tiny else "xut_base"


@dataclass(frozen=True)
class Part:
    """One measurement."""

    seconds: int  # time limit
    run: Callable[[Session, float], int]  # takes the seconds it has; returns an exit status


def console(command: str, *arguments: object) -> list[str]:
    """Return a console command of this package for the running Python, which need not have it installed."""
    module = {"hdm-train": "train", "hdm-train-vae": "train_vae", "hdm-bench": "bench", "hdm-sample": "sample"}[command]
    code = f"import sys; from hdm_lightning.cli.{module} import main; sys.argv[0] = {command!r}; sys.exit(main())"
    return [sys.executable, "-c", code, *map(str, arguments)]


def call(session: Session, name: str, command: list[str], seconds: float) -> int:
    """Run a command with output to NAME.log; stop it after its time, then kill it. Return its status."""
    with (session.out / f"{name}.log").open("a") as log:
        return ended(start(command, log), seconds)


def start(command: list[str], log: IO[str]) -> subprocess.Popen[bytes]:
    """Start a command from the repository's root, with this folder's modules importable; log its words first."""
    print(f"$ {shlex.join(command)}", file=log, flush=True)
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)


def ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Wait for a process and return its exit status; 124 if it had to be stopped after `seconds`."""
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return 124


def gpu_tests(session: Session, seconds: float) -> int:
    """Run the tests that are marked `gpu`; at tiny sizes they are only collected."""
    more = ["--collect-only"] if session.tiny else ["-v", "--durations=0"]
    return call(
        session, "tests", [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", *more, "tests/gpu"], seconds
    )


def bench(part: str, name: str, **options: object) -> Callable[[Session, float], int]:
    """Return a case of hdm-bench, compiled on a GPU, written to NAME.json."""

    def run(session: Session, seconds: float) -> int:
        tiny = {"resolution": 64, "batch": 2, "context": 16, "repeats": 2, "warmup": 1}
        chosen = {**options, **{key: tiny[key] for key in options if key in tiny}} if session.tiny else options
        flags = [f"--{key}={value}" for key, value in chosen.items() if value is not True]
        switches = [key for key, value in chosen.items() if value is True]
        flags += [f"--{key}" for key in switches if key != "compile" or not session.tiny]
        where = [f"--size={session.size}", f"--device={session.device}", f"--out={session.out / f'{name}.json'}"]
        return call(session, name, console("hdm-bench", part, *flags, *where), seconds)

    return run


def beside(session: Session, seconds: float) -> int:
    """Time the network and another one in turn."""
    command = [sys.executable, str(HERE / "beside.py"), str(session.published), str(session.out / "beside.json")]
    return call(session, "beside", [*command, session.size, session.device], seconds)


def prepare(session: Session, seconds: float) -> int:
    """Write folders of random encoders of the true sizes, which hdm-train reads like those of trained ones."""
    command = [sys.executable, str(HERE / "random_encoders.py"), str(session.work / "encoders"), session.size]
    return call(session, "prepare", command, seconds)


def training(session: Session) -> list[str]:
    """Return the command of the real training: the paper's first two stages, cut short."""
    sizes = (
        {"px256": (64, 96, 8, 4, 16), "px512": (96, 96, 8, 4, 16)}
        if session.tiny
        else {"px256": (256, 1_280_000, 128, 64, 256), "px512": (512, 1920, 64, 32, 256)}
    )
    stages = []
    for name, (resolution, samples, batch, micro, context) in sizes.items():
        values = {"resolution": resolution, "samples": samples, "batch_size": batch, "micro_batch_size": micro}
        values |= {"context_length": context, "warmup_samples": batch * 4, "save_every": 0, "sample_every": 0}
        values |= {"validate_every": samples // 2 if session.tiny and name == "px256" else 0}
        if name == "px256" and not session.tiny:
            values["stop.max_hours"] = (RATE_S + COMPILE_S) / 3600
        stages += [f"schedule.stages.{name}.{key}={value}" for key, value in values.items()]
    encoders = session.work / "encoders"
    network = ["model.width=64", "model.mlp_width=128", "model.heads=2", "model.head_dim=32", "model.context_width=32"]
    network += [
        "model.depth=2",
        "model.decoder_blocks=1",
        "data.num_workers=0",
        "validation.batch_size=4",
        "trainer=cpu",
    ]
    return console(
        "hdm-train",
        *("name=recorded", f"run_dir={session.work / 'run'}", f"data.train={DRAWINGS}", "validation.samples=16"),
        *(f"text_encoder.name={encoders / 'text'}", f"vae.name={encoders / 'vae'}", "logger=many_loggers"),
        *("schedule=paper", "~schedule.stages.px768", "~schedule.stages.px1024", "trainer.log_every_n_steps=5"),
        *("callbacks.progress=null", "callbacks.weight_averages.halflife_samples=[5000]"),
        *("+callbacks.watch._target_=watch_steps.WatchSteps", f"+callbacks.watch.file={session.out / STEPS}"),
        *stages,
        *(network if session.tiny else ["trainer=gpu", "data.num_workers=12"]),
    )


def steps_of(session: Session, stage: str) -> int:
    """Return the number of steps of a stage recorded so far."""
    file = session.out / STEPS
    if not file.exists():
        return 0
    return sum(row["stage"] == stage for row in map(json.loads, file.read_text().splitlines()))


def train(session: Session, seconds: float) -> int:
    """Run hdm-train over two stages: stop it by SIGTERM in the second, resume it, and compute its rates."""
    end, command = time.monotonic() + seconds - GRACE_S, training(session)
    (session.out / STEPS).unlink(missing_ok=True)  # from an earlier recording
    with (session.out / "train.log").open("a") as log:
        first = start(command, log)
        while first.poll() is None and steps_of(session, "px512") < 4 and time.monotonic() < end:
            time.sleep(0.2)
        first.send_signal(signal.SIGTERM)
        stopped = ended(first, GRACE_S * session.patience)
        rates(session, stopped_with=stopped)
        if stopped not in (0, 143):
            return stopped
        resumed = ended(start(command, log), end - time.monotonic())
        rates(session, stopped_with=stopped, resumed_with=resumed)
        return resumed


def rates(session: Session, **more: Any) -> None:
    """Write train.json: first step, median step, images per second and graphs of each fit, from the recorded steps."""
    fits: list[list[dict[str, Any]]] = []
    file = session.out / STEPS
    for row in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
        if row["started"]:
            fits.append([])
        fits[-1].append(row)
    found = [rate(first, rest) for first, *rest in fits]
    (session.out / "train.json").write_text(json.dumps({"fits": found, **more}, indent=1) + "\n")


def rate(first: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the steps of a fit; the two after the first are still warm-up and left out of the rates."""
    row = {"stage": first["stage"], "from_step": first["step"], "steps": len(steps)}
    if steps:
        losses = [step["loss"] for step in steps if step["loss"] is not None]
        row |= {"first_step_s": steps[0]["time"] - first["time"], "losses": losses}
        row |= {"graphs": steps[-1]["graphs"], "breaks": steps[-1]["breaks"]}
    late = steps[2:]
    if len(late) > 1:
        batch = late[1]["samples"] - late[0]["samples"]
        median = statistics.median(after["time"] - before["time"] for before, after in pairwise(late))
        whole = late[-1]["time"] - late[0]["time"]
        row |= {"median_step_s": median, "images_per_s_of_median_step": batch / median}
        row |= {"images_per_s": batch * (len(late) - 1) / whole, "over_s": whole}
    return row


def sample(session: Session, seconds: float) -> int:
    """Run hdm-sample on what was trained: with random encoders the images are noise, but the path is the real one."""
    options = ["--size", "64x64", "--steps", "2"] if session.tiny else ["--size", "512x512", "--steps", "24"]
    folder = session.work / "run"
    command = console("hdm-sample", folder, "a red circle", *options, "--count", 2, "--out", session.out / "samples")
    return call(session, "sample", command, seconds)


def profile(session: Session, seconds: float) -> int:
    """Profile the kernels of a whole compiled training step."""
    command = [sys.executable, str(HERE / "profile_step.py"), str(session.out), session.size, session.device]
    return call(session, "profile", command, seconds)


def drawings(session: Session, seconds: float) -> int:
    """Train on the drawings with the time that is left: autoencoder, then network, then images."""
    vae, run = session.work / "drawings_vae", session.work / "drawings"
    device, hours = ["trainer=cpu"] if session.tiny else ["trainer=gpu"], seconds / 3600
    budget = "hdm_lightning.training.callbacks.ends.Budget"
    autoencoder = [
        "vae_training=openclipart_cpu",
        "data=openclipart_mini",
        f"run_dir={vae}",
        "name=drawings_vae",
        *device,
    ]
    autoencoder += [f"+callbacks.budget._target_={budget}", f"+callbacks.budget.max_hours={hours / 4}"]
    network = ["experiment=openclipart_cpu", f"vae.name={vae / 'final'}", f"run_dir={run}", *device]
    network += [f"schedule.stages.{name}.stop.max_hours={hours / 4}" for name in ("px64", "px128")]
    if session.tiny:
        autoencoder += ["stage.samples=64", "validation.samples=4"]
        network += [f"schedule.stages.{name}.samples=64" for name in ("px64", "px128")]
        network += ["validation.samples=4", "text_encoder.whiten_captions=0", "callbacks.sample_images=null"]
    prompts = ["a red apple", "a blue house", "a yellow sun", "a green tree"]
    commands = [
        console("hdm-train-vae", *autoencoder),
        console("hdm-train", *network),
        console("hdm-sample", run, *prompts, "--size", "128x128", "--out", session.out / "drawings"),
    ]
    end = time.monotonic() + seconds
    statuses = (call(session, "drawings", command, end - time.monotonic()) for command in commands)
    return next(filter(None, statuses), 0)


OVERLAP: dict[str, object] = {"resolution": 256, "batch": 32, "context": 256, "caption-tokens": 64, "accumulation": 4}
OVERLAP |= {"repeats": 6, "compile": True, "against": "overlap=true"}
CACHED: dict[str, object] = {"resolution": 256, "batch": 64, "context": 256, "caption-tokens": 64, "accumulation": 4}
CACHED |= {"repeats": 6, "compile": True, "latents": True, "against": "latents=false"}
PARTS: dict[str, Part] = {
    "tests": Part(90, gpu_tests),
    "network": Part(60, bench("xut", "network", resolution=256, batch=64, context=256, repeats=10, compile=True)),
    "short_text": Part(50, bench("xut", "short_text", resolution=256, batch=64, context=64, repeats=10, compile=True)),
    "beside": Part(90, beside),
    "step": Part(70, bench("step", "step", resolution=256, batch=64, context=256, repeats=10, compile=True)),
    "prepare": Part(60, prepare),
    "train": Part(260, train),
    "sample": Part(40, sample),
    "profile": Part(60, profile),
    "network_512": Part(
        50, bench("xut", "network_512", resolution=512, batch=24, context=256, repeats=6, compile=True)
    ),
    "network_1024": Part(
        60, bench("xut", "network_1024", resolution=1024, batch=4, context=512, repeats=4, compile=True)
    ),
    "overlap": Part(60, bench("step", "overlap", **OVERLAP)),
    "cached": Part(60, bench("step", "cached", **CACHED)),
    "drawings": Part(600, drawings),
}
"""In order."""


def main() -> int:
    """Run the parts; return 0 if all of them succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="results (default: experiments/benchmarks/NAME_OF_THE_DEVICE)"
    )
    parser.add_argument(
        "--published",
        type=Path,
        metavar="FILE",
        help="time another network as well; beside.py describes FILE",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/hdm-gpu-record"), metavar="FOLDER", help="scratch space"
    )
    parser.add_argument("--limit", type=float, default=480, metavar="S", help="seconds for everything (default: 480)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU, to see that every part runs")
    given = parser.parse_args()
    unknown = sorted(set(given.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")
    device = device_name(given.tiny)
    out = given.out or (given.work if given.tiny else RESULTS) / re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    published = given.published and given.published.absolute()
    session = Session(out.absolute(), given.work.absolute(), given.tiny, published)
    shutil.rmtree(session.work, ignore_errors=True)
    session.work.mkdir(parents=True)
    session.out.mkdir(parents=True, exist_ok=True)
    return run_parts(session, device, [name for name in PARTS if name in (given.parts or PARTS)], given.limit)


def run_parts(session: Session, device: str, names: list[str], limit: float) -> int:
    """Run parts within a limit of seconds, and keep record.json up to date."""
    begin, rows = time.monotonic(), []
    for name in names:
        left = limit - (time.monotonic() - begin) - GRACE_S  # a part may overrun its time by this
        row: dict[str, Any] = {"part": name, "began_s": round(time.monotonic() - begin, 1)}
        if name == "beside" and session.published is None:
            rows.append(row | {"status": LEFT_OUT})
        elif left < 10:
            rows.append(row | {"status": "no time left"})
        else:
            print(f"[{row['began_s']:6.1f} s] {name}", flush=True)
            status = PARTS[name].run(session, min(left, session.patience * PARTS[name].seconds))
            rows.append(row | {"status": status, "took_s": round(time.monotonic() - begin - row["began_s"], 1)})
            print(f"           {'done' if status == 0 else f'status {status}: see {name}.log'}", flush=True)
        record = {"device": device, "parts": rows}
        (session.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["status"] in (0, LEFT_OUT) for row in rows) else 1


def device_name(tiny: bool) -> str:
    """Return CUDA's name of the device."""
    if tiny:
        return "cpu"
    import torch  # noqa: PLC0415 (seconds to import, too slow for --help)

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible; --tiny runs the parts on a CPU")
    return torch.cuda.get_device_name()


if __name__ == "__main__":
    raise SystemExit(main())
