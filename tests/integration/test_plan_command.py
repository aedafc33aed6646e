"""hdm-plan as a command, and its probe on the machine at hand."""

import json

import pytest

from hdm_lightning.cli.overrides import composed
from hdm_lightning.cli.plan import main
from hdm_lightning.cli.plan_schedule import run_plan
from hdm_lightning.profiling.gpus import CPU, Gpu, Machine
from hdm_lightning.profiling.timing import Timing
from hdm_lightning.training.recorded import recorded_values

TINY_RUN = [
    "model=xut_base",
    "model.width=32",
    "model.mlp_width=64",
    "model.heads=2",
    "model.head_dim=16",
    "model.context_width=16",
    "model.depth=1",
    "trainer=cpu",
    "gpus=here",
    "schedule.stages.px256.resolution=64",
    "schedule.stages.px256.context_length=16",
    "~schedule.stages.px512",
    "~schedule.stages.px768",
    "schedule.stages.px1024.resolution=32",
    "schedule.stages.px1024.context_length=16",
]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Function that runs `hdm-plan` in an empty folder and returns its exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["hdm-plan", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    return run


def test_the_command_prints_tables_and_writes_json(command, tmp_path, capsys):
    assert command("gpus=1x4090", 'out="plans/[one].json"') == 0
    told = capsys.readouterr().out
    assert "1x4090: time and cost" in told and "written to plans/[one].json" in told
    content = json.loads((tmp_path / "plans/[one].json").read_text())
    assert content["machine"]["count"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["plans"]  # no folder of a run is left behind


def test_an_unknown_gpu_ends_with_one_screen_and_status_2(command, capsys):
    assert command("gpus=4x5091") == 2
    told = capsys.readouterr().err
    assert "gpus: there is no GPU '5091'" in told
    assert "did you mean gpus=4x5090" in told
    assert "Traceback" not in told


def planned(*overrides, log):
    return run_plan(recorded_values(composed("plan", [*TINY_RUN, *overrides])), log=log).content


def test_a_probe_recalibrates_with_measured_steps(tiny_text_encoder, tiny_autoencoder, monkeypatch):
    monkeypatch.setattr("hdm_lightning.profiling.system.CPU_MATMUL", 256)
    monkeypatch.setattr("hdm_lightning.profiling.system.CPU_COPY_MIB", 16)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    encoders = [f"text_encoder.name={tiny_text_encoder}", "vae=folder", f"vae.name={tiny_autoencoder}"]
    probe = ["probe=true", "probe_settings.steps=3", "probe_settings.stages=[px256]", "probe_settings.micro_batch=2"]
    lines = []
    content = planned(*encoders, *probe, log=lines.append)
    assert len(lines) == 1
    rate = float(lines[0].split()[1])  # images/s as measured, one device
    assert content["machine"]["gpu"]["name"] == "cpu"
    assert not content["recipe"]["mixed"]
    first, last = content["stages"]
    assert first["utilisation"] == pytest.approx(last["utilisation"])  # the stage not measured takes the mean
    assert content["assumptions"]["utilisation"] == pytest.approx(first["utilisation"])
    assert 0 < first["utilisation"] < 1
    # A larger micro-batch and fewer optimizer steps make it somewhat faster than the probe's own steps.
    assert 0.9 * rate < first["images_per_s"] < 3 * rate


def test_a_probe_s_steps_encode_all_also_of_a_stage_that_will_read_latents_or_states(
    tiny_text_encoder, tiny_autoencoder, monkeypatch
):
    """The same steps in the same time are the same utilisation, whatever the training will read."""
    machine = Machine(Gpu(CPU, 1.0, 16.0, 10.0, link_gb_s=10.0, power_w=0.0, usd_per_hour=0.0), 1)
    monkeypatch.setattr("hdm_lightning.cli.plan_schedule.machine_at_hand", lambda: machine)
    monkeypatch.setattr("hdm_lightning.cli.probe.time_call", lambda *_, **__: Timing((1.0,)))
    encoders = [f"text_encoder.name={tiny_text_encoder}", "vae=folder", f"vae.name={tiny_autoencoder}"]
    probe = ["probe=true", "probe_settings.stages=[px1024]", "probe_settings.micro_batch=2"]
    pixels, latents, states = (
        planned(*encoders, *probe, *read, log=lambda _: None)
        for read in ([], ["dataset.latents=true"], ["data.text_states=/states"])
    )
    assert pixels["assumptions"]["utilisation"] > 0
    for each in (latents, states):
        assert each["assumptions"]["utilisation"] == pixels["assumptions"]["utilisation"]
