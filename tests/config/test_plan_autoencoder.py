"""hdm-plan autoencoder: every key of hdm-train-vae understood, what fits, and messages that name the hint."""

import json

import pytest
from rich.console import Console

from hdm_lightning.cli.overrides import composed
from hdm_lightning.cli.plan_autoencoder import autoencoder_report, plan_autoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.profiling.forecast import plain

TINY = ("vae_training=from_scratch_tiny", "stage.micro_batch_size=2", "stage.batch_size=2")


def planned(*overrides):
    return plan_autoencoder(composed("plan_autoencoder", overrides))


@pytest.mark.parametrize("name", ["plan", "plan_autoencoder"])
def test_a_plan_leaves_no_folder(name):
    hydra = composed(name, return_hydra_config=True).hydra
    assert hydra.run.dir == "." and hydra.output_subdir is None


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    room = 0.05  # GiB
    plan = planned(*TINY, "gpus=1x4090", f"gpu_memory_gib={room}", "reserve_gib=0", "trainer.precision=32-true")
    assert 2 < plan.largest < 200
    for batch, fits in ((plan.largest, True), (plan.largest + 1, False)):
        sized = (f"stage.micro_batch_size={batch}", f"stage.batch_size={batch}")
        again = planned(
            TINY[0], *sized, "gpus=1x4090", f"gpu_memory_gib={room}", "reserve_gib=0", "trainer.precision=32-true"
        )
        assert again.fits is fits
        assert (again.memory.peak <= room * 2**30) is fits


def test_a_device_that_is_not_here_can_be_planned_for(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = planned(*TINY, "gpus=1x4090", "trainer.accelerator=cuda")
    assert plan.memory == planned(*TINY, "gpus=1x4090", "trainer.precision=bf16-mixed").memory


def test_what_is_written_and_shown():
    plan = planned(*TINY, "gpus=2x5090", "stage.batch_size=4")
    content = json.loads(json.dumps(plain(plan)))
    assert content["machine"] == "2x5090" and content["memory_gib"] == 32 and content["fits"]
    memory = content["memory"]
    assert memory["peak"] == memory["kept"] + memory["passing"]
    assert memory["moments"] == 2 * memory["gradients"]
    console = Console(width=120, record=True, quiet=True)
    console.print(autoencoder_report(plan))
    small = planned(*TINY, "gpus=1x3090", "gpu_memory_gib=0.003", "reserve_gib=0")
    assert small.largest == 0 and not small.fits


def test_mistakes_are_named():
    for overrides, where in [
        (("gpus=1x6090",), "gpus"),
        (("stage.resolution=65", "gpus=1x5090"), "stage.resolution"),
        (("gpu_memory_gib=-1",), "gpu_memory_gib"),
        (("reserve_gib=-1",), "reserve_gib"),
        (("gpu_memory_gib=2", "reserve_gib=3"), "gpu_memory_gib"),
        (("out=/dev/null/plan.json",), "out"),
        (("loss.pixel=l7",), "loss.pixel"),
    ]:
        with pytest.raises(UserError) as caught:
            planned(*TINY, *overrides)
        assert caught.value.where == where
