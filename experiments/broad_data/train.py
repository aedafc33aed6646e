"""Training over http on two processes, undisturbed or killed, and a record of the samples it has seen."""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.broad_data.commands import ShardServer, command, done
from experiments.broad_data.seen import lines

MODEL = ["experiment=openclipart_cpu", "data=coyo700m", "model=xut_demo", "model.context_width=384", "logger=none"]
TWO = ["trainer.devices=2", "hardware.threads=1", "data.num_workers=1"]
SEEN = ["+callbacks.seen._target_=experiments.broad_data.seen.SeenSamples", "+callbacks.seen.stage=${stage.name}"]
FORGETFUL = ["text_encoder.cache_size=0", "vae.cache_size=0"]
"""A cache is empty after a restart, so other samples are encoded together, and rounding differs."""

QUIET = ["callbacks.sample_images.prompts=[]", "callbacks.progress=null", "validation.samples=64"]
BATCH = 32


def autoencoder(shards: Path, run_dir: Path, samples: int) -> str:
    """Train a tiny autoencoder and return the last line that the command prints."""
    few = [f"stage.samples={samples}", f"patches.samples={samples // 2}", "trainer=cpu", "logger=none"]
    few += ["hardware.threads=1", "callbacks.progress=null", "data.num_workers=0"]
    return done("train-vae", "vae_training=from_scratch_tiny", f"data.train={shards}", f"run_dir={run_dir}", *few)[-1]


def train(shards: Path, run_dir: Path, vae: Path, samples: dict[str, int], kills: Sequence[float]) -> dict[str, Any]:
    """Train on a folder behind a server, killed after these shares of the samples; see `told`.

    Args:
        shards: the folder.
        run_dir: of the run, which is started afresh.
        vae: the run of the autoencoder.
        samples: of each stage, by its name.
        kills: in order.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    seen = run_dir.with_name(f"{run_dir.name}-seen")
    shutil.rmtree(seen, ignore_errors=True)
    seen.mkdir()
    server = ShardServer(shards)
    words = [*MODEL, *TWO, *FORGETFUL, *SEEN, *QUIET, f"+callbacks.seen.folder={seen}", f"data.train={server.url}"]
    words += [f"vae.name={vae / 'final'}", f"run_dir={run_dir}", "text_encoder.whiten_captions=200"]
    for name, count in samples.items():
        stage = f"schedule.stages.{name}"
        words += [f"{stage}.samples={count}", f"{stage}.validate_every=0", f"{stage}.sample_every=0"]
        words += [f"{stage}.save_every={max(BATCH, count // 10 // BATCH * BATCH)}", f"{stage}.batch_size={BATCH}"]
        words += [f"{stage}.micro_batch_size={BATCH // 2}"]
    killed_at = [_kill(words, seen, samples, share) for share in kills]
    done("train", *words)
    server.shutdown()
    return {"killed_at": killed_at, "served": dict(server.count), **told(run_dir, seen)}


def _kill(words: list[str], seen: Path, samples: dict[str, int], share: float) -> dict[str, Any]:
    process = command("train", *words)
    while (at := _position(seen, samples)) < share * sum(samples.values()):
        if process.poll() is not None:
            raise RuntimeError(f"ended before it could be killed:\n{process.communicate()[0][-3000:]}")
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    _wait_for_ranks(words)
    return {"samples": at, "signal": "SIGKILL to the command and all its processes"}


def _wait_for_ranks(words: list[str]) -> None:
    """Wait until no process of the killed run is left."""
    run_dir = next(word for word in words if word.startswith("run_dir="))
    for _ in range(600):
        if subprocess.run(["pgrep", "-f", run_dir], stdout=subprocess.DEVNULL, check=False).returncode:
            return
        time.sleep(0.1)


def _position(seen: Path, samples: dict[str, int]) -> int:
    """Return the samples that the first process has reached, over all stages."""
    path = seen / "seen-0.jsonl"
    if not path.exists():
        return 0
    found, at = [line for line in lines(seen) if line["rank"] == "0"], 0
    for name, count in samples.items():
        own = [max(line["index"]) + 1 for line in found if line["stage"] == name]
        if own and name == found[-1]["stage"]:
            return at + max(own)
        at += count
    return 0


def told(run_dir: Path, seen: Path) -> dict[str, Any]:
    """Return the weights' checksum, the samples seen in each stage and the peak memory."""
    found = lines(seen)
    weights = (run_dir / "final" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    masked = run_dir / "quarantine.jsonl"
    return {
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "masked": len(masked.read_text().splitlines()) if masked.exists() else 0,
        "stages": {name: _of_stage(found, name) for name in dict.fromkeys(line["stage"] for line in found)},
        "peak_mb_of_ranks": [_most(found, rank, "peak_mb") for rank in ("0", "1")],
        "peak_mb_of_workers": [_most(found, rank, "workers_peak_mb") for rank in ("0", "1")],
    }


def _most(found: list[dict[str, Any]], rank: str, key: str) -> float:
    values = [line[key] for line in found if line["rank"] == rank and key in line]
    return max(max(each, default=0) if isinstance(each, list) else each for each in values)


def order(found: list[dict[str, Any]], stage: str) -> dict[int, set[tuple[str, bool]]]:
    """Return the samples that each position of a stage held, each time it was seen."""
    held: dict[int, set[tuple[str, bool]]] = {}
    for line in found:
        if line["stage"] == stage:
            for position, *what in zip(line["index"], line["keys"], line["good"], strict=True):
                held.setdefault(position, set()).add(tuple(what))
    return held


def _of_stage(found: list[dict[str, Any]], stage: str) -> dict[str, Any]:
    held = order(found, stage)
    often = Counter(name for each in held.values() for name, _ in each)
    text = "".join(f"{position} {sorted(held[position])}\n" for position in sorted(held))
    return {
        "positions": len(held),
        "without_a_gap": sorted(held) == list(range(len(held))),
        "positions_that_changed": sum(len(each) > 1 for each in held.values()),
        "bad": sum(not good for each in held.values() for _, good in each),
        "different_samples": len(often),
        "most_often": max(often.values()),
        "trained_again_after_kills": sum(len(line["index"]) for line in found if line["stage"] == stage) - len(held),
        "order_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
