"""A run on white text states: the folder keeps the map, and the exported model reads plain states."""

from pathlib import Path

import pytest
import torch

from composed import check_job, composed, run_job, saved_in, weights_of
from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.encoders.text_whitening import TextWhitening, WhitenedTextEncoder
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.evaluation.subject import load_subject
from hdm_lightning.generation.loading import LoadOptions
from hdm_lightning.interop.pipeline_folder import read_pipeline_folder
from hdm_lightning.models import XUT
from hdm_lightning.training.flow_run import first_network

CAPTIONS = ["a red square", "two blue circles on white", ""]


def velocity(network, encoder, tokenize):
    """The network's answer to the captions, in float64 comparison range."""
    generator = torch.Generator().manual_seed(1)
    latent, t = torch.randn(3, 4, 4, 4, generator=generator), torch.tensor([0.2, 0.5, 0.9])
    pairs = [tokenize(caption) for caption in CAPTIONS]
    tokens, lengths = torch.tensor([tokens for tokens, _ in pairs]), torch.tensor([length for _, length in pairs])
    with torch.no_grad():
        return network(latent, t, encoder.encode(tokens, lengths), context_lengths=lengths)


@pytest.fixture(scope="module")
def run(tmp_path_factory, toy_job):
    config = toy_job(tmp_path_factory.mktemp("whitened") / "run", px16={"samples": 16, "save_every": 8})
    config["text_encoder"] = {**config["text_encoder"], "whiten_captions": 8}
    assert run_job(check_job(config)) == 0
    return config


def test_the_exported_model_reads_plain_states(run):
    folder = Path(run["run_dir"])
    whitening = TextWhitening.load(folder / "text_whitening.safetensors")
    plain, tokenize = load_text_encoder(run["text_encoder"]["name"]), Tokenizer(run["text_encoder"]["name"]).bind(8)
    exported = read_pipeline_folder(folder / "final").load_network("raw")
    trained = XUT(exported.config)
    trained.load_state_dict(weights_of(run))
    torch.nn.init.normal_(trained.output_projection.weight, generator=torch.Generator().manual_seed(2))
    exported.output_projection.load_state_dict(trained.output_projection.state_dict())
    expected = velocity(trained, WhitenedTextEncoder(plain, whitening), tokenize)
    assert torch.allclose(velocity(exported, plain, tokenize), expected, atol=1e-4)
    assert not torch.allclose(velocity(exported, WhitenedTextEncoder(plain, whitening), tokenize), expected, atol=1e-2)
    evaluated = load_subject(saved_in(run, "01-px16")[-1], LoadOptions()).networks["raw"]()
    assert torch.allclose(evaluated.text_projection.weight, exported.text_projection.weight)


def test_starting_from_it_turns_it_back(run):
    folder = Path(run["run_dir"])
    whitening = TextWhitening.load(folder / "text_whitening.safetensors")
    trained = read_pipeline_folder(folder / "final").load_network("ema")
    network, report = first_network(composed({**run, "init": str(folder)}), whitening)
    assert report is not None and "text_projection.weight" in report.loaded
    weight, bias = whitening.fold(network.text_projection.weight, network.text_projection.bias)
    assert torch.allclose(weight, trained.text_projection.weight, atol=1e-5)
    assert torch.allclose(bias, trained.text_projection.bias, atol=1e-5)


def test_the_map_of_a_start_that_trained_nothing_is_measured_anew(run, tmp_path):
    """As where the text encoder or the captions were changed since."""
    config = {**run, "run_dir": str(tmp_path / "again")}
    stale = tmp_path / "again" / "text_whitening.safetensors"
    stale.parent.mkdir()
    stale.write_bytes(TextWhitening.measure(torch.randn(99, 32)).to_bytes())
    assert run_job(check_job(config)) == 0
    assert stale.read_bytes() == (Path(run["run_dir"]) / stale.name).read_bytes()


def test_the_map_is_measured_once(run):
    path = Path(run["run_dir"]) / "text_whitening.safetensors"
    before = path.stat().st_mtime_ns
    run["schedule"]["stages"]["px16"]["samples"] = 24
    (Path(run["run_dir"]) / "01-px16" / "done.json").unlink()
    assert run_job(check_job(run)) == 0
    assert path.stat().st_mtime_ns == before
