"""From img2dataset's output to a trained model, on a stand-in: `python -m experiments.broad_data.run`.

Index, filter by the set's own columns, train an autoencoder and a small model on two processes over http with ranges,
once without a break and once killed twice; what comes out is counted against what was written.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from experiments.data_soak.soak import Handler, Server
from experiments.study_jobs import circumstances, write_result

from hdm_lightning.data.index import load_index

HERE = Path(__file__).parent
LIMITS = {"min": {"aesthetic_score_laion_v2": 4.5}, "max": {"watermark_score": 0.5}}
MODEL = ["experiment=openclipart_cpu", "data=coyo700m", "model=xut_demo", "model.context_width=384", "logger=none"]
TWO = ["trainer.devices=2", "hardware.threads=1", "data.num_workers=1", "data.crop.max_upscale=null"]
STAGES = "schedule.stages"


def command(name: str, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command of the package, in a group of its own."""
    line = [str(Path(sys.executable).with_name(f"hdm-{name}")), *words]
    print("$", f"hdm-{name}", *words, flush=True)
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **(env or {})},
    )


def done(name: str, *words: str) -> str:
    """Run a command to its end; what it said."""
    process = command(name, *words)
    said = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"hdm-{name} ended with status {process.returncode}:\n{said[-3000:]}")
    return said


def serve(folder: Path) -> Server:
    """The folder over http on loopback: ranges, and the troubles of `data_soak`."""
    server = Server(("127.0.0.1", 0), Handler)
    server.folder, server.asked, server.lock = folder, {}, threading.Lock()
    server.troubles = dict.fromkeys(("none", "error", "cut", "slow"), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def written(folder: Path) -> dict[str, int]:
    """What the parquet files and the archives say of the set, read without this package."""
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    good = {row["key"]: row for row in rows if row["status"] == "success"}
    pages = 0
    for path in sorted(folder.glob("*.parquet")):
        with tarfile.open(path.with_suffix(".tar")) as archive:
            images = (member for member in archive if member.name.endswith(".jpg"))
            bad = [each.name[:-4] for each in images if archive.extractfile(each).read(2) != b"\xff\xd8"]
        pages += len(bad)
        for key in bad:
            del good[key]
    kept = [row for row in good.values() if all(row[key] >= least for key, least in LIMITS["min"].items())]
    kept = [row for row in kept if all(row[key] <= most for key, most in LIMITS["max"].items())]
    return {
        "rows": len(rows),
        "images": len(good) + pages,
        "pages_of_html": pages,
        "good": len(good),
        "kept": len(kept),
    }


def filtered(folder: Path, out: Path) -> None:
    """A copy of the set without what its own columns speak against."""
    least, most = ([f"{key}={value}" for key, value in LIMITS[kind].items()] for kind in ("min", "max"))
    done("shards", "filter", str(folder), "--out", str(out), "--min", *least, "--max", *most)


def train(url: str, run_dir: Path, vae: Path, samples: int, *, kills: int) -> dict[str, Any]:
    """Train over http on two processes, killed so many times; the checksum of what is exported."""
    words = [
        *MODEL,
        *TWO,
        f"data.train={url}",
        f"vae.name={vae}",
        f"run_dir={run_dir}",
        "text_encoder.whiten_captions=200",
    ]
    words += [f"{STAGES}.px64.samples={samples * 3 // 4}", f"{STAGES}.px128.samples={samples // 4}"]
    words += [
        "callbacks.sample_images.prompts=[]",
        "callbacks.stage_checkpoint.every_n_samples=1024",
        "validation.samples=64",
    ]
    words += [
        f"{STAGES}.{name}.{key}={value}"
        for name in ("px64", "px128")
        for key, value in (("validate_every", 0), ("sample_every", 0))
    ]
    begun = time.monotonic()
    for kill in range(kills):
        process, known = command("train", *words), set(run_dir.rglob("*.ckpt"))
        while len(set(run_dir.rglob("*.ckpt")) - known) <= kill and process.poll() is None:
            time.sleep(0.1)
        if process.poll() is not None:
            raise RuntimeError(f"ended before it could be killed:\n{process.communicate()[0][-3000:]}")
        time.sleep(1.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    said = done("train", *words)
    weights = (run_dir / "final" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    masked = run_dir / "quarantine.jsonl"
    return {
        "kills": kills,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "masked": len(masked.read_text().splitlines()) if masked.exists() else 0,
        "wall_s": round(time.monotonic() - begun, 1),
        "resumed": said.count("resume"),
    }


def main(given: Sequence[str] | None = None) -> None:
    """All steps; goes on after those that are done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=61_000)
    parser.add_argument("--samples", type=int, default=20_480, help="of the training")
    parser.add_argument("--work", type=Path, default=Path("runs/broad_data"))
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    arguments = parser.parse_args(given)
    work = arguments.work.absolute()
    whole, kept, vae = work / "set", work / "kept", work / "vae"
    if not whole.is_dir():
        stand_in = [sys.executable, "-m", "experiments.broad_data.stand_in", "--out", str(whole)]
        subprocess.run([*stand_in, "--rows", str(arguments.rows)], check=True)
    expected = written(whole)
    said = done("shards", "build", "img2dataset", str(whole))
    if not (kept / "index.json").exists():
        filtered(whole, kept)
    cut = max(load_index(whole).shards, key=lambda each: each.name)
    found = {
        "samples": load_index(whole).samples,
        "of_the_cut_shard": cut.samples,
        "left_out": sum(len(each.skip) for each in load_index(whole).shards),
        "kept": load_index(kept).samples,
        "said": said.splitlines(),
    }
    if not (vae / "final").is_dir():
        small = ["stage.samples=12000", "patches.samples=10000", "trainer=cpu", "hardware.threads=2", "logger=none"]
        done("train-vae", "vae_training=from_scratch_tiny", f"data.train={kept}", f"run_dir={vae}", *small)
    server = serve(kept)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    runs = {
        name: train(url, work / name, vae / "final", arguments.samples, kills=kills)
        for name, kills in (("whole", 0), ("killed", 2))
    }
    same = len({each["sha256"] for each in runs.values()}) == 1
    write_result(
        arguments.out,
        {
            "expected": expected,
            "found": found,
            "trainings": runs,
            "same_weights": same,
            "requests": server.troubles,
            "made": circumstances(),
        },
    )
    print("same weights:", same)


if __name__ == "__main__":
    main()
