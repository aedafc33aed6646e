"""A whole run with Muon and power-function averages: interrupted equals whole, and hdm-convert gives other averages."""

from pathlib import Path

import numpy as np
import pytest
import torch

from composed import check_job, end_of, run_job
from crash import crashing_at
from hdm_lightning.cli.convert import main as convert
from hdm_lightning.interop.layouts import read_release
from hdm_lightning.training.averaging.power_function import FOLDER, gamma_of
from hdm_lightning.training.callbacks.weight_averages import WeightAverages
from hdm_lightning.training.checkpoint_io import network_weights

NAME = "output_projection.weight"


@pytest.fixture(scope="module")
def runs(toy_job, tmp_path_factory):
    """Folders of a whole run and of an interrupted one, and the weights after each step of the whole one."""
    folder, seen = tmp_path_factory.mktemp("averages"), []
    configs = []
    for name in ("whole", "broken"):
        config = toy_job(folder / name)
        config["optimizer"] = {"_target_": "hdm_lightning.training.optimization.muon.MuonAdamW"}
        config["schedule"]["carry_moments"] = True
        config["callbacks"]["weight_averages"] = {"halflife_samples": [16], "sigma_rel": [0.05, 0.1]}
        config["callbacks"]["store_averages"] = {"every_n_samples": 8, "dtype": "float32"}
        configs.append(config)
    with pytest.MonkeyPatch.context() as patch:
        original = WeightAverages.on_step_end

        def note(self, trainer, module, step):
            weight = dict(module.network.named_parameters())[NAME]
            seen.append((module.samples_per_step, weight.detach().double().numpy().copy()))
            original(self, trainer, module, step)

        patch.setattr(WeightAverages, "on_step_end", note)
        assert run_job(check_job(configs[0])) == 0
    for stage, step in (("px16", 3), ("px24", 1)):
        with crashing_at(step, stage):
            run_job(check_job(configs[1]))
    assert run_job(check_job(configs[1])) == 0
    return folder / "whole", folder / "broken", seen


def test_interrupted_equals_whole_bit_for_bit(runs):
    whole, broken, _ = runs
    states = [end_of(run, "02-px24") for run in (whole, broken)]
    one, two = (network_weights(state) for state in states)
    assert all(torch.equal(two[name], value) for name, value in one.items())
    kinds = {key for state in states[0]["optimizer_states"][0]["state"].values() for key in state}
    assert {"momentum_buffer", "exp_avg"} <= kinds
    files = [sorted((run / FOLDER).iterdir()) for run in (whole, broken)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert len(files[0]) == 2 * 8  # six steps of 8 samples, two of 16, two widths
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_an_average_of_another_width_is_the_sum_over_the_run_s_own_steps(runs, tmp_path, capsys):
    whole, _, seen = runs
    assert convert([str(whole), str(tmp_path / "model"), "--average", "0.08"]) == 0
    assert "at 80 samples, from 16 stored" in capsys.readouterr().out
    got = dict(read_release(tmp_path / "model").network.named_parameters())[NAME].detach().double().numpy()
    edges = np.cumsum([0, *[samples for samples, _ in seen]]) / 80
    shares = np.diff(edges ** (gamma_of(0.08) + 1))
    expected = sum(share * weight for share, (_, weight) in zip(shares, seen, strict=True))
    moved = np.abs(seen[-1][1] - seen[0][1]).max()
    assert np.abs(got - expected).max() < 0.005 * moved
    assert np.abs(got - expected).max() < np.abs(seen[-1][1] - expected).max()


def test_a_stored_width_and_time_is_what_the_file_holds(runs, tmp_path):
    whole, _, _ = runs
    assert convert([str(whole), str(tmp_path / "model"), "--average", "0.05", "--samples", "48"]) == 0
    averaged = end_of(whole)["callbacks"]["WeightAverages"]
    expected = averaged["shadows"][len(averaged["halflives"])][NAME]
    got = dict(read_release(tmp_path / "model").network.named_parameters())[NAME]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "48"], "only applies to --average"),
        (["--average", "0.5"], "is out of range"),
        (["--average", "0.1"], ""),
    ],
)
def test_mistakes_are_told_on_one_screen(runs, tmp_path, capsys, options, said):
    whole, _, _ = runs
    source = whole if said else whole / "final"  # the model alone has no stored averages
    assert convert([str(source), str(tmp_path / "model"), *options]) == 2
    assert (said or "no stored averages") in capsys.readouterr().err
    assert not Path(tmp_path / "model").exists()
