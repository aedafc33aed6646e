"""A run's folder with a tiny model, as a training leaves one, for what shows or draws with runs."""

import json

import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from toy_run import MODEL, shaken_state, write_final

STAGE = {"batch_size": 8, "micro_batch_size": 4, "learning_rate": 0.2, "routing_rate": 0.0, "context_length": 8}
SAMPLING = {"height": 32, "width": 32, "steps": 3, "guidance_scale": 2.0}


def write_run(folder, text_encoder, autoencoder, *, seed=0, finished=True, tag="val/loss"):
    """Two stages of 16 and 32 px: the first has ended, of the second 32 of 64 samples are done unless finished."""
    folder.mkdir(parents=True)
    stages = {"px16": {**STAGE, "resolution": 16, "samples": 96}, "px32": {**STAGE, "resolution": 32, "samples": 64}}
    config = {
        "name": folder.name,
        "model": MODEL,
        "schedule": {"stages": stages},
        "text_encoder": {"name": str(text_encoder)},
        "vae": {"name": str(autoencoder)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    second = 64 if finished else 32
    lines = [
        {"event": "start", "stage": "px16", "samples": 0, "devices": 2},
        {"event": "end", "stage": "px16", "samples": 96, "seconds": 48.0, "device_hours": 0.02, "cost_usd": 0.5},
        {"event": "start", "stage": "px32", "samples": 0, "devices": 2},
        {
            "event": "progress",
            "stage": "px32",
            "samples": second,
            "seconds": 64.0,
            "device_hours": 0.03,
            "cost_usd": 1.0,
        },
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps({"time": "now", **line}) + "\n" for line in lines))
    for number, (name, base) in enumerate((("px16", 0), ("px32", 96)), start=1):
        stage = folder / f"{number:02d}-{name}"
        with SummaryWriter(stage / "tensorboard") as writer:
            for step in range(0, 33, 8):
                writer.add_scalar("train/loss_mean", 2.0 / (1 + base + step), base + step)
            writer.add_scalar(tag, 0.25 / number, base + 32)
        (stage / "samples").mkdir()
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(stage / "samples" / f"{base + 32:012d}-16x16.png")
    (folder / "01-px16" / "done.json").write_text(
        json.dumps({"stage": "px16", "steps": 12, "samples": 96, "ended_by": "samples", "validation": {"raw": 0.5}})
    )
    if finished:
        write_model(folder / "final", text_encoder, autoencoder, seed=seed)
    return folder


def write_model(folder, text_encoder, autoencoder, *, seed=0):
    """A pipeline's folder with averaged and last weights, whose own settings tell it from one of another seed."""
    sampling = {**SAMPLING, "steps": SAMPLING["steps"] + seed}
    write_final(folder, text_encoder, autoencoder, shaken_state(seed=seed), raw=True, sampling=sampling)
