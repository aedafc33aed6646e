"""Starting from a trained model: which tensors are taken, and what is told of the others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composed import check_job, composed, end_of, run_job, saved_in, weights_of
from hdm_lightning.errors import UserError
from hdm_lightning.interop.published import export_state_dict, load_xut
from hdm_lightning.interop.tensor_files import write_tensors
from hdm_lightning.models import PUBLISHED, XUT
from hdm_lightning.training.flow_run import first_network
from hdm_lightning.training.initial_weights import load_initial_weights
from hdm_lightning.training.recorded import model_config_from


def filled(config):
    """A network without a zero in it."""
    torch.manual_seed(3)
    network = XUT(config)
    with torch.no_grad():
        for value in network.parameters():
            value.normal_()
    return network


@pytest.fixture
def config(toy_job, tmp_path):
    return toy_job(tmp_path / "run", px16={"samples": 16}, px24={"samples": 8, "resolution": 24})


@pytest.fixture
def given(config, tmp_path):
    """A safetensors file of a network of this shape, under its own names, and the network."""
    network = filled(model_config_from(config["model"]))
    path = tmp_path / "given.safetensors"
    save_file(network.state_dict(), path)
    return path, network


def test_every_tensor_is_taken_and_a_stage_starts_from_it(config, given):
    path, network = given
    config["init"] = str(path)
    fresh, report = first_network(composed(config))
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in fresh.state_dict().items())
    assert report.loaded == sorted(network.state_dict())
    assert report.missing == report.reshaped == report.unused == []


def test_a_run_its_final_folder_and_its_model_file_mean_the_same(config, tmp_path):
    assert run_job(check_job(config)) == 0
    run_dir = Path(config["run_dir"])
    file = run_dir / "final" / "transformer/diffusion_pytorch_model.safetensors"
    expected = load_file(file)
    for source in (run_dir, run_dir / "final", run_dir / "final" / "transformer", file):
        network, report = first_network(composed({**config, "init": str(source)}))
        assert all(torch.equal(network.state_dict()[n.removeprefix("network.")], v) for n, v in expected.items())
        assert len(report.loaded) == len(expected) and report.unused == []


@pytest.mark.parametrize("file", ["hdm.safetensors", "hdm.ckpt", "unet/diffusion_pytorch_model.safetensors"])
def test_published_names_and_half_precision_are_read(config, tmp_path, file):
    """Two-cell patches, so that a shuffled kernel would show; in half precision even the frequencies are."""
    model = replace(model_config_from(config["model"]), patch_size=2, **PUBLISHED)
    network, (prefix, is_folder) = filled(model), ("model.", True) if "/" in file else ("unet.model.", False)
    tensors = {prefix + name: value.half() for name, value in export_state_dict(network).items()}
    if not is_folder:
        tensors["vae_mean"] = torch.zeros(1, 4, 1, 1)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    write_tensors(tmp_path / file, tensors)
    fresh = XUT(model)
    report = load_initial_weights(fresh, str(tmp_path if is_folder else tmp_path / file))
    assert report.missing == report.reshaped == report.unused == report.wiring == []
    for name, value in fresh.named_parameters():
        assert torch.equal(value, dict(network.named_parameters())[name].half().float()), name
    assert torch.equal(fresh.time_embedding.frequencies, network.time_embedding.frequencies)
    sample = (torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 3, 16))
    assert torch.equal(fresh(*sample), load_xut(model, tensors).float()(*sample))


def test_a_training_checkpoint_is_read(config):
    assert run_job(check_job(config)) == 0
    network, _ = first_network(composed({**config, "init": str(saved_in(config, "02-px24")[-1])}))
    trained = weights_of(config, "02-px24")
    assert all(torch.equal(value, trained[name]) for name, value in network.state_dict().items())


def test_what_is_missing_of_another_shape_or_unused_is_told_and_recorded(config, given, tmp_path, capsys):
    path, network = given
    tensors = dict(network.state_dict())
    tensors["stray"] = torch.zeros(3)
    tensors["text_projection.weight"] = torch.zeros(32, 5)
    missing = sorted(name for name in tensors if name.startswith("blocks_after"))
    save_file({name: value for name, value in tensors.items() if name not in missing}, path)
    (path.parent / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n# The base")
    config["init"] = str(path)
    assert len(missing) > 8 and run_job(check_job(config)) == 0
    told = capsys.readouterr().out
    assert f"missing, initialized afresh: {len(missing)}: {missing[0]}" in told and "init.json" in told
    assert "other shape, initialized afresh: 1: text_projection.weight" in told
    assert "in the file but not used: 1: stray" in told
    recorded = json.loads((Path(config["run_dir"]) / "init.json").read_text())
    assert (recorded["missing"], recorded["unused"], recorded["source"]) == (missing, ["stray"], str(path))
    card = (Path(config["run_dir"]) / "final" / "README.md").read_text()
    assert "\nlicense: cc-by-nc-sa-4.0\n" in card and str(path.parent) not in card  # its base binds it
    unset, report = first_network(composed({**config, "init": None}))
    again, _ = first_network(composed(config))
    assert report is None
    for name in (*missing, "text_projection.weight"):
        assert torch.equal(again.state_dict()[name], unset.state_dict()[name])
    taken = sorted(set(network.state_dict()) - set(missing) - {"text_projection.weight"})
    assert recorded["loaded"] == taken
    assert all(torch.equal(again.state_dict()[name], network.state_dict()[name]) for name in taken)


def test_mistakes_are_named(config, tmp_path):
    config["init"] = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no model in") as caught:
        check_job(config)
    assert caught.value.where == "init"
    (tmp_path / "text.safetensors").write_text("this is no tensor file")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        given = composed({**config, "init": str(tmp_path / f"{name}.safetensors")})
        with pytest.raises(UserError) as caught:
            first_network(given)
        assert caught.value.where == "init" and caught.value.hint


def test_the_model_is_not_asked_for_once_the_first_stage_is_done(config, given):
    path, _ = given
    config["init"] = str(path)
    assert run_job(check_job(config)) == 0
    run_dir = Path(config["run_dir"])
    expected = end_of(config, "02-px24")["state_dict"]
    (run_dir / "02-px24" / "done.json").unlink()
    saved_in(config, "02-px24")[-1].unlink()
    path.unlink()
    assert run_job(check_job(config)) == 0
    got = end_of(config, "02-px24")["state_dict"]
    assert all(torch.equal(got[name], value) for name, value in expected.items())
