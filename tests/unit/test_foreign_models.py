"""Folders of pretrained models that carry code: none of it runs, whatever is answered."""

import json
import os
import pickle
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel

from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.clip import load_clip
from hdm_lightning.generation.feature_networks import load_feature_network
from hdm_lightning.training.flow_checks import text_width

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class C(PretrainedConfig):
    model_type = "never-heard-of"
class M(PreTrainedModel):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""


class Evil:
    """Unpickling it leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that the code in the folder would leave; every question is answered with y."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    return tmp_path / "ran"


@pytest.fixture
def folder(tiny_text_encoder, tmp_path, mark):
    """A text encoder's folder with code beside it."""
    place = tmp_path / "model"
    shutil.copytree(tiny_text_encoder, place)
    (place / "code.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "never-heard-of", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (place / "config.json").write_text(json.dumps(config))
    (place / "preprocessor_config.json").write_text(
        json.dumps({"size": 8, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]})
    )
    tokenizer = json.loads((place / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    (place / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return place


@pytest.mark.parametrize(
    "load",
    [
        load_text_encoder,
        text_width,
        lambda name: Tokenizer(name).transformers,
        lambda name: load_feature_network(name, torch.device("cpu")),
        lambda name: load_clip(name, torch.device("cpu")),
    ],
    ids=["text encoder", "width", "tokenizer", "feature network", "clip"],
)
def test_code_beside_a_model_never_runs(folder, mark, load):
    with pytest.raises(UserError):
        load(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_an_attention_kernel_named_by_the_folder_is_not_fetched(tiny_text_encoder, tmp_path, key):
    place = tmp_path / "model"
    shutil.copytree(tiny_text_encoder, place)
    config = json.loads((place / "config.json").read_text())
    config[key] = "somebody/kernel"
    (place / "config.json").write_text(json.dumps(config))
    tokens, lengths = torch.tensor([[2, 3, 4]]), torch.tensor([3])
    expected = load_text_encoder(str(tiny_text_encoder)).encode(tokens, lengths)
    encoder = load_text_encoder(str(place))
    assert encoder.model.config._attn_implementation == "sdpa"
    assert torch.equal(encoder.encode(tokens, lengths), expected)


def test_an_architecture_without_torchs_attention_is_read_too(tmp_path):
    config = T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    assert load_text_encoder(str(tmp_path)).width == 16


def test_pickled_weights_beside_safetensors_are_not_read(tiny_text_encoder, tiny_autoencoder, tmp_path, mark):
    for source, name, load in (
        (tiny_text_encoder, "pytorch_model.bin", load_text_encoder),
        (tiny_autoencoder, "diffusion_pytorch_model.bin", load_autoencoder),
    ):
        place = tmp_path / source.name
        shutil.copytree(source, place)
        (place / name).write_bytes(pickle.dumps(Evil(mark)))
        load(str(place))
        for weights in place.glob("*.safetensors"):
            weights.unlink()
        with pytest.raises(UserError):
            load(str(place))
    assert not mark.exists()


def test_pickled_weights_alone_are_read_as_plain_data(tiny_text_encoder, tiny_autoencoder, tmp_path):
    place = tmp_path / "vae"
    shutil.copytree(tiny_autoencoder, place)
    vae = AutoencoderKL.from_pretrained(str(place), low_cpu_mem_usage=False)
    for weights in place.glob("*.safetensors"):
        weights.unlink()
    vae.save_pretrained(place, safe_serialization=False)
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    expected = load_autoencoder(str(tiny_autoencoder)).encode(image)
    assert torch.equal(load_autoencoder(str(place)).encode(image), expected)
