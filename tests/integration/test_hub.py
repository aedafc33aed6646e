"""Runs that go to a hub and come back from it, with huggingface_hub against a stand-in on loopback."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composed import check_job, run_job
from hdm_lightning import HDMPipeline, load_text_encoder
from hdm_lightning.cli import sample
from hdm_lightning.encoders import pretrained
from hdm_lightning.errors import UserError
from hdm_lightning.interop.layouts import read_vae_folder, write_published
from hdm_lightning.interop.pipeline_folder import read_pipeline_folder
from hdm_lightning.interop.release import Release
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig
from hdm_lightning.training import flow_run
from hdm_lightning.training.hub_upload import Hub, upload
from hub import standing_in
from toy_run import MODEL


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_unreachable", {})
    with standing_in(tmp_path / "cache") as found:
        yield found


@pytest.fixture
def job(toy_job, tmp_path):
    config = toy_job(tmp_path / "run", px16={"samples": 16}, px24={"samples": 16, "resolution": 24})
    return {**config, "hub": {"push": "me/toy", "at": "stages"}}


def test_a_run_is_pushed_at_its_stages_and_draws_from_the_hub_as_from_here(hub, job, tmp_path, capsys):
    assert run_job(check_job(job)) == 0
    assert hub.messages == ["toy: stage px16", "toy: final"]
    final = Path(job["run_dir"]) / "final"
    weights = {str(path.relative_to(final)) for path in final.rglob("*.safetensors")}
    assert weights and all(hub.files["me/toy"][name] == (final / name).read_bytes() for name in weights)
    assert f"{hub.url}/me/toy" in capsys.readouterr().out
    settings = {"seed": 3, "num_inference_steps": 2, "output_type": "pt"}
    ours = HDMPipeline.from_pretrained(final)("a red circle", **settings).images
    theirs = HDMPipeline.from_pretrained("me/toy")("a red circle", **settings).images
    assert torch.equal(ours, theirs)
    for number, model in enumerate((str(final), "me/toy")):
        options = ["a star", "--out", str(tmp_path / "drawn"), "--device", "cpu", "--steps", "2"]
        assert sample.main([model, *options]) == 0, number
    one, other = sorted((tmp_path / "drawn").glob("0*.png"))
    assert torch.equal(*(torch.frombuffer(bytearray(_pixels(path)), dtype=torch.uint8) for path in (one, other)))


def _pixels(path):
    from PIL import Image

    return Image.open(path).tobytes()


def texts_on(hub, name):
    """What of a repository is no tensor and no picture, by the file's name."""
    return {path: held.decode() for path, held in hub.files[name].items() if not path.endswith(("safetensors", "png"))}


@pytest.mark.parametrize("beside", [False, True], ids=["a path", "a plain name in the working folder"])
def test_nothing_on_the_hub_names_a_place_of_this_machine(hub, job, tmp_path, monkeypatch, beside):
    """Neither from a run whose text encoder lies here, which goes along, nor from a pipeline that pushes itself."""
    if beside:
        encoder = Path(job["text_encoder"]["name"])
        monkeypatch.chdir(encoder.parent)
        job["text_encoder"] = {**job["text_encoder"], "name": encoder.name}
    job["callbacks"] = {"sample_images": {"prompts": ["a *star* | <b>"], "steps": 1, "aspect_ratios": [1.0]}}
    job["hub"] |= {"license": "cc-by-sa-4.0"}
    assert run_job(check_job(job)) == 0
    HDMPipeline.from_pretrained(Path(job["run_dir"]) / "final").push_to_hub("me/again")
    HDMPipeline.from_pretrained("me/toy").push_to_hub("me/third")
    for name in ("me/toy", "me/again", "me/third"):
        texts = texts_on(hub, name)
        assert {"README.md", "model_index.json", "vae/config.json", "text_encoder/config.json"} <= texts.keys()
        lines = [f"{path}: {line}" for path, text in texts.items() for line in text.splitlines()]
        assert not [line for line in lines if str(Path(job["run_dir"]).parent.parent) in line]
        assert "license: cc-by-sa-4.0" in texts["README.md"] and "40 samples in all" in texts["README.md"]
        assert "validation loss, raw" in texts["README.md"]
    assert hub.files["me/toy"]["samples.png"].startswith(b"\x89PNG")
    assert "- a \\*star\\* \\| &lt;b&gt;" in texts_on(hub, "me/toy")["README.md"]
    assert "samples.png" not in texts_on(hub, "me/again")["README.md"]


@pytest.mark.parametrize("license", ["", "a license", "mit\nname: x"])
def test_what_is_no_license_s_name_is_refused(job, license):
    with pytest.raises(UserError, match="is not a license identifier") as refused:
        check_job({**job, "hub": {"push": None, "license": license}})
    assert refused.value.where == "hub.license"


def test_a_fine_tuning_begins_from_the_hub(hub, job, toy_job, tmp_path):
    assert run_job(check_job({**job, "hub": {"push": "me/toy"}})) == 0
    tuned = {**toy_job(tmp_path / "tuned", tune={"samples": 8}), "init": "me/toy", "vae": {"name": None}}
    tuned["model"] = {**tuned["model"], "width": None}
    checked = check_job(tuned)
    assert checked.config.model.width == 32
    assert run_job(checked) == 0
    began = read_pipeline_folder(Path(job["run_dir"]) / "final").load_network().state_dict()
    ended = read_pipeline_folder(tmp_path / "tuned" / "final").load_network().state_dict()
    assert max(float((ended[name] - value).abs().max()) for name, value in began.items()) < 0.5


def test_a_lora_over_a_base_of_this_machine_is_pushed_without_its_paths(hub, job, toy_job, tmp_path):
    base = tmp_path / "base"
    assert run_job(check_job(toy_job(base, px16={"samples": 8}))) == 0
    stages = {"one": {"samples": 8, "routing_rate": 0.0}, "two": {"samples": 8, "routing_rate": 0.0}}
    config = {**toy_job(tmp_path / "ink", **stages), "init": str(base), "hub": {"push": "me/ink", "at": "stages"}}
    config |= {"adapter": {"_target_": "hdm_lightning.LoRA", "rank": 2}, "module": {"rule": "constant"}}
    assert run_job(check_job(config)) == 0
    assert hub.messages == ["toy: stage one", "toy: final"]
    texts = {name: held.decode() for name, held in hub.files["me/ink"].items() if not name.endswith("safetensors")}
    assert not [name for name, text in texts.items() if str(tmp_path) in text]
    assert "base_model:" not in texts["README.md"] and "--lora me/ink" in texts["README.md"]
    uploaded = json.loads(texts["adapter_base.json"])["base"]
    kept = json.loads((tmp_path / "ink/final/adapter_base.json").read_text())["base"]
    assert uploaded == {"name": "base", "sha256": kept["sha256"]} and kept["name"] == str(base)


def test_a_hub_that_refuses_says_so_before_anything_is_trained(hub, job):
    hub.refuses = True
    with pytest.raises(UserError, match="the hub refused") as refused:
        run_job(check_job(job))
    assert refused.value.where == "hub.push" and "hf auth login" in refused.value.hint
    assert not list(Path(job["run_dir"]).glob("*/checkpoints"))


def test_a_push_that_fails_at_the_end_loses_nothing(hub, tmp_path):
    hub.refuses = True
    (tmp_path / ".upload-1").mkdir()
    (tmp_path / ".upload-1" / "a").write_text("b")
    with pytest.raises(UserError, match="refused") as refused:
        upload(tmp_path / ".upload-1", Hub(push="me/toy"), "toy")
    assert "same command" in refused.value.hint
    assert str(tmp_path) not in refused.value.hint  # the folder may be gone when the user reads it


def test_a_published_file_is_drawn_by_its_repository_s_name_with_a_word_on_its_license(
    hub, published, tmp_path, capsys
):
    hub.files["them/net"] = {"net.safetensors": published, "README.md": b"---\nlicense: cc-by-nc-sa-4.0\n---\n# A net"}
    assert sample.main(["them/net", *published.options(tmp_path)]) == 0
    assert "cc-by-nc-sa-4.0, according to its card" in capsys.readouterr().err
    hub.files["them/two"] = {"one.safetensors": published, "two.safetensors": published}
    assert sample.main(["them/two", *published.options(tmp_path)]) == 2
    assert "them/two/one.safetensors" in capsys.readouterr().err
    assert sample.main(["them/two/two.safetensors", *published.options(tmp_path)]) == 0
    assert "does not state a license" in capsys.readouterr().err
    first, second = sorted((tmp_path / "out").glob("0*.png"))
    assert _pixels(first) == _pixels(second)


def test_the_pipeline_reads_what_was_published_and_says_its_license(hub, published, tiny_text_encoder, tmp_path):
    own = {"text_encoder": load_text_encoder(str(tiny_text_encoder))}
    hub.files["them/net"] = {"net.safetensors": published, "README.md": b"---\nlicense: cc-by-nc-sa-4.0\n---\n# A net"}
    hub.files["them/silent"] = {"net.safetensors": published}
    settings = {"seed": 0, "height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0}
    with pytest.warns(UserWarning, match=r"cc-by-nc-sa-4\.0, according to its card.*forbids commercial use"):
        pipeline = HDMPipeline.from_pretrained("them/net", **own)
    with pytest.warns(UserWarning, match="does not state a license.*released.*CC-BY-NC-SA"):
        again = HDMPipeline.from_pretrained("them/silent", **own)
    assert sample.main(["them/net", *published.options(tmp_path)]) == 0
    drawn = [each("a star", **settings).images[0].tobytes() for each in (pipeline, again)]
    assert drawn == [_pixels(tmp_path / "out" / "0000-a-star-0.png")] * 2
    (tmp_path / "here.safetensors").write_bytes(published)
    here = HDMPipeline.from_pretrained(tmp_path / "here.safetensors", **own)
    assert here("a star", **settings).images[0].tobytes() == drawn[0]
    with pytest.raises(UserError, match="variant"):
        HDMPipeline.from_pretrained(tmp_path / "here.safetensors", variant="raw", **own)


@pytest.mark.parametrize("status", [301, 401, 403, 404, 429, 500, 503])
def test_a_hub_that_does_not_give_a_model_is_told_on_one_screen(hub, status, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it asks again
    hub.status["them/net"] = status
    with pytest.raises(UserError, match=r"them/net.* could not be downloaded") as refused:
        HDMPipeline.from_pretrained("them/net")
    assert refused.value.where == "model" and "hf auth login" in refused.value.hint
    pretrained._unreachable.clear()
    assert sample.main(["them/net", "a star", "--device", "cpu"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_are_no_numbers_are_named(job, tmp_path, part):
    assert run_job(check_job({**job, "hub": {"push": None}})) == 0
    HDMPipeline.from_pretrained(Path(job["run_dir"]) / "final").save_pretrained(tmp_path / "saved")
    file = next((tmp_path / "saved" / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"{part}.*NaN"):
        HDMPipeline.from_pretrained(tmp_path / "saved")
    assert sample.main([str(tmp_path / "saved"), "a star", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2


@pytest.fixture
def published(tiny_text_encoder, tiny_autoencoder, tmp_path):
    """The bytes of a single file with an autoencoder inside, and the options to draw with it."""
    config = XUTConfig(**MODEL, **PUBLISHED)
    vae = read_vae_folder(Path(tiny_autoencoder))
    write_published(tmp_path / "net.safetensors", Release(XUT(config), **vae))

    class Content(bytes):
        def options(self, folder):
            named = ["--text-encoder", str(tiny_text_encoder), "--out", str(folder / "out"), "--device", "cpu"]
            return ["a star", "--size", "16x16", "--steps", "1", "--guidance", "1", *named]

    return Content((tmp_path / "net.safetensors").read_bytes())


def test_a_pipeline_pushes_itself(hub, job, tmp_path):
    assert run_job(check_job({**job, "hub": {"push": None}})) == 0
    pipeline = HDMPipeline.from_pretrained(Path(job["run_dir"]) / "final")
    pipeline.push_to_hub("me/mine")
    assert {"model_index.json", "README.md", "vae/config.json"} <= set(hub.files["me/mine"])
    back = HDMPipeline.from_pretrained("me/mine").network.state_dict()
    assert all(torch.equal(value, back[name]) for name, value in pipeline.network.state_dict().items())


@pytest.mark.parametrize("name", ["toy", "me/", "me/toy/more", "https://hub/me/toy"])
def test_what_is_no_name_is_refused(job, name):
    with pytest.raises(UserError, match="OWNER/NAME"):
        check_job({**job, "hub": {"push": name}})


def test_a_stage_that_cannot_be_uploaded_ends_no_run(hub, job, monkeypatch, capsys):
    def fails(run, checkpoint, plan, folder, **options):
        if plan is not run.plans[-1]:
            assert folder.is_relative_to(run.run_dir)
            raise OSError("no space left")
        return export(run, checkpoint, plan, folder, **options)

    export = flow_run.export_pipeline
    monkeypatch.setattr(flow_run, "export_pipeline", fails)
    assert run_job(check_job(job)) == 0
    assert hub.messages == ["toy: final"]
    said = "warning: stage px16 was not uploaded to the hub: no space left"
    assert said in capsys.readouterr().out and said in (Path(job["run_dir"]) / "train.log").read_text()
    assert not list(Path(job["run_dir"]).glob(".upload-*"))


def test_a_network_that_is_no_xut_is_not_pushed(job):
    with pytest.raises(UserError, match="only an XUT") as refused:
        check_job({**job, "model": {"_target_": "torch.nn.Identity"}})
    assert refused.value.where == "hub.push"
