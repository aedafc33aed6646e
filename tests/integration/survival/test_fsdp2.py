"""Processes that split the network among themselves (FSDP2) against ones that each hold all of it (DDP)."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdm_lightning.profiling.operations import parameter_count
from hdm_lightning.training.recorded import model_config_from

NETWORK = "final/transformer/diffusion_pytorch_model"
ROUNDING = 2e-5
"""Of float32, through as many of AdamW's steps as there are here, at rates that move weights by about 1."""
EMA = {"halflife_samples": [16], "ramp": 0.0, "sigma_rel": [0.2]}
STORED = {"every_n_samples": 16, "dtype": "float32"}
PICTURES = {"prompts": ["red circle", "small blue square"], "steps": 2, "aspect_ratios": [1.0]}
STAGE = {"samples": 32, "gradient_clip": 0.05, "learning_rate": 0.5}


def trainer(strategy="fsdp2", **changes):
    return {"accelerator": "cpu", "log_every_n_steps": 2, "strategy": strategy, **changes}


def furthest(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def validation(toy, number=1):
    return json.loads((toy.stage_folder(number) / "done.json").read_text())["validation"]


def files(toy, pattern):
    return sorted(path.relative_to(toy.folder) for path in toy.folder.rglob(pattern))


def scalars(toy, tag):
    events = EventAccumulator(str(toy.stage_folder(1) / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def test_two_parts_train_as_two_copies(toy, server, tmp_path):
    """Two stages, accumulation, clipping, averages, validation, pictures and scalars; and what a process holds."""
    callbacks = {"progress": None, "weight_averages": EMA, "store_averages": STORED, "sample_images": PICTURES}
    stages = {"px16": STAGE, "px24": {**STAGE, "samples": 16, "resolution": 24, "activation_checkpointing": True}}
    schedule = toy(stages=stages).config["schedule"] | {"carry_moments": True}
    copies = toy("copies", trainer=trainer("ddp"), callbacks=callbacks, schedule=schedule)
    parts = toy("parts", trainer=trainer(), callbacks=callbacks, schedule=schedule)
    assert server.run(copies, ranks=2) == [0, 0]
    assert server.run(parts, ranks=2, note_parts={"folder": str(tmp_path)}) == [0, 0]
    for stage in (1, 2):
        assert furthest(copies.end(stage), parts.end(stage)) < ROUNDING
        expected, got = validation(copies, stage), validation(parts, stage)
        assert got == pytest.approx(expected, abs=ROUNDING)
        assert abs(expected["raw"] - expected["ema_16"]) > 100 * ROUNDING  # else one could stand for the other
    for tag in ("optimizer/gradient_norm", "optimizer/weight_norm", "train/loss_mean", "val/loss_power_0.200"):
        assert scalars(parts, tag) == pytest.approx(scalars(copies, tag), rel=1e-4)
    for path in files(copies, "*.png"):
        one, two = (np.asarray(Image.open(run.folder / path)).astype(int) for run in (copies, parts))
        assert np.abs(one - two).max() <= 1 and one.std() > 10
    stored = files(copies, "ema_snapshots/*.safetensors")
    assert len(stored) == 3 and stored == files(parts, "ema_snapshots/*.safetensors")
    for path in (*stored, f"{NETWORK}.safetensors", f"{NETWORK}.raw.safetensors"):
        assert furthest(load_file(copies.folder / path), load_file(parts.folder / path)) < ROUNDING
    whole = parameter_count(model_config_from(parts.config["model"]))
    for rank in range(2):
        held = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert held == {"weights": whole / 2, "gradients": whole / 2, "moments": whole, "averages": whole}


def test_interrupted_equals_whole(toy, server, same):
    stages = {"px16": {**STAGE, "samples": 8}, "px24": {**STAGE, "samples": 24, "resolution": 24}}
    schedule = toy(stages=stages).config["schedule"] | {"carry_moments": True}
    whole, killed = (toy(name, trainer=trainer(), schedule=schedule) for name in ("whole", "killed"))
    assert server.run(whole, ranks=2) == [0, 0]
    assert -9 in server.run(killed, ranks=2, die={"at": "optimizer", "nth": 4, "how": "kill", "on": 1})
    assert killed.checkpoints(2) == ["step-00000002.ckpt"]
    assert server.run(killed, ranks=2) == [0, 0]
    assert same(whole.end(2), killed.end(2)) and validation(whole, 2) == validation(killed, 2)


@pytest.mark.parametrize(("before", "after"), [(("fsdp2", 2), ("ddp", 1)), (("ddp", 1), ("fsdp2", 2))])
def test_a_run_goes_on_under_the_other_strategy(toy, server, before, after):
    whole, changed = toy("whole", {"px16": STAGE}), toy("changed", {"px16": STAGE})
    assert server.run(whole) == [0]
    in_fourth_step = 1 + 3 * 4 // before[1]  # four micro-batches a step
    changed.config["trainer"] = trainer(before[0])
    die = {"at": "forward", "nth": in_fourth_step, "how": "kill all", "on": 0}
    assert -9 in server.run(changed, ranks=before[1], die=die)
    assert changed.checkpoints() == ["step-00000002.ckpt"]
    changed.config["trainer"] = trainer(after[0])
    assert set(server.run(changed, ranks=after[1])) == {0}
    assert furthest(whole.end(), changed.end()) < ROUNDING
    assert validation(changed) == pytest.approx(validation(whole), abs=ROUNDING)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_both(toy, server, same):
    whole, stopped = (toy(name, {"px16": STAGE}, trainer=trainer()) for name in ("whole", "stopped"))
    assert server.run(whole, ranks=2) == [0, 0]
    in_third_step = 1 + 2 * 2
    statuses = server.run(stopped, ranks=2, die={"at": "forward", "nth": in_third_step, "how": "term", "on": 1})
    assert statuses == [143, 143]
    assert stopped.checkpoints()[-1] == "step-00000003.ckpt"
    assert server.run(stopped, ranks=2) == [0, 0]
    assert same(whole.end(), stopped.end())


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_a_rewind_goes_back_to_the_stage_s_beginning(toy, server, same, number):
    """To the initial weights in the first stage, to those handed over in the second."""
    stages = {"px16": {**STAGE, "samples": 16, "save_every": 0}, "px24": {**STAGE, "samples": 16, "save_every": 0}}
    poisoned, told = (toy(name, stages, trainer=trainer()) for name in ("poisoned", "told"))
    stage = list(stages)[number - 1]
    assert server.run(poisoned, ranks=2, poison={"stage": stage, "positions": [9], "factor": None}) == [0, 0]
    assert server.run(told, ranks=2, jump={"stage": stage, "first": 0, "end": 16}) == [0, 0]
    assert [rewind["checkpoint_step"] for rewind in poisoned.rewinds(number)] == [0]
    assert same(poisoned.end(2), told.end(2))


@pytest.mark.slow
def test_parts_of_unequal_size(toy, server, tmp_path):
    """Three processes: 32 rows are 11, 11 and 10, and of 2 rows the last process has none."""
    stage = {**STAGE, "batch_size": 6, "samples": 24}
    copies, parts = (
        toy("copies", {"px16": stage}, trainer=trainer("ddp")),
        toy("parts", {"px16": stage}, trainer=trainer()),
    )
    assert server.run(copies, ranks=3) == [0] * 3
    assert server.run(parts, ranks=3, note_parts={"folder": str(tmp_path)}) == [0] * 3
    assert furthest(copies.end(), parts.end()) < ROUNDING
    held = [json.loads((tmp_path / f"rank{rank}.json").read_text())["weights"] for rank in range(3)]
    assert sum(held) == parameter_count(model_config_from(parts.config["model"]))
    assert min(held) < max(held) < 1.1 * sum(held) / 3


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks(toy, server, recompute):
    stage = {**STAGE, "samples": 16, "activation_checkpointing": recompute}
    plain = toy("plain", {"px16": stage}, trainer=trainer())
    compiled = toy("compiled", {"px16": stage}, trainer=trainer(), hardware={"compile": True})
    assert server.run(plain, ranks=2) == [0, 0]
    assert server.run(compiled, ranks=2) == [0, 0]
    assert furthest(plain.end(), compiled.end()) < ROUNDING


@pytest.mark.slow
def test_in_bfloat16(toy, server):
    """The sums of bfloat16 gradients take another order, which AdamW's first steps magnify; losses are the same."""
    stage = {**STAGE, "learning_rate": 0.05}
    callbacks = {"progress": None, "weight_averages": EMA, "store_averages": STORED, "sample_images": PICTURES}
    runs = [
        toy(name, {"px16": stage}, trainer=trainer(name, precision="bf16-mixed"), callbacks=callbacks)
        for name in ("ddp", "fsdp2")
    ]
    assert [server.run(run, ranks=2) for run in runs] == [[0, 0]] * 2
    assert validation(runs[1]) == pytest.approx(validation(runs[0]), rel=1e-3)
    drawn = [[file.as_posix() for file in files(run, "*.png")] for run in runs]
    assert drawn[1] == drawn[0] == ["01-px16/samples/000000000032-16x16.png", "final/samples.png"]
