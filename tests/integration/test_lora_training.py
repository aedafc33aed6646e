"""A run that trains an adapter: what it trains, keeps, resumes from and refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composed import check_job, end_of, run_job
from crash import crashing_at
from hdm_lightning import HDMPipeline, LoRA
from hdm_lightning.cli import convert
from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_files import read_adapter
from hdm_lightning.interop.adapters import weights_sha256
from hdm_lightning.interop.pipeline_folder import read_pipeline_folder
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.training.strategies.parallelize import prepare_network

RANK = 2
OF_INIT = dict.fromkeys(XUTConfig.__dataclass_fields__)
STAGE = {"samples": 32, "learning_rate": 0.01, "routing_rate": 0.0}


@pytest.fixture(scope="module")
def base(toy_job, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert run_job(check_job(toy_job(folder, px16={"samples": 16}))) == 0
    return folder


@pytest.fixture
def lora_job(toy_job, base, tmp_path):
    """Function of a name and of stages that gives the configuration of an adapter's run over the base."""

    def configuration(name="lora", **stages):
        config = toy_job(tmp_path / name, **(stages or {"tune": STAGE}))
        config |= {"init": str(base), "model": {"_target_": "hdm_lightning.XUT.from_fields", **OF_INIT}}
        config["text_encoder"] = {"name": None, "layer": None}
        config["vae"] = {"name": None}
        config["module"] = {"rule": "constant"}
        config["adapter"] = {
            "_target_": "hdm_lightning.LoRA",
            "rank": RANK,
            "targets": ["attention", "feed_forward", "text_projection", "modulation"],
        }
        for stage in config["schedule"]["stages"].values():
            stage |= {"resolution": None, "context_length": None} if stage["resolution"] == 16 else {}
        return config

    return configuration


def final(config):
    return Path(config["run_dir"]) / "final"


def test_only_the_adapter_is_trained_and_saved(lora_job, base, capsys):
    config = lora_job()
    drawn = {"prompts": ["a star"], "steps": 2, "aspect_ratios": [1.0]}
    config["callbacks"] = {**config["callbacks"], "sample_images": drawn}
    assert run_job(check_job(config)) == 0
    assert list(Path(config["run_dir"]).glob("01-tune/samples/*.png"))
    stored = read_pipeline_folder(base / "final").load_network().state_dict()
    trained = load_file(final(config) / "adapter_model.safetensors").values()
    assert f"LoRA of rank {RANK}, {sum(each.numel() for each in trained):,} of " in capsys.readouterr().out
    adapter = read_adapter(final(config))
    assert adapter.base.sha256 == weights_sha256(stored)
    assert Path(adapter.base.name) == base
    assert all(layer.up.abs().max() > 0 and layer.rank == RANK for layer in adapter.layers.values())
    assert {"text_projection", "modulation.feed_forward.output"} <= set(adapter.layers)
    assert adapter.settings["sampling"]["height"] == 16 and adapter.settings["context_length"] == 8
    checkpoint = end_of(config, "01-tune")
    assert checkpoint["state_dict"] and all("lora_" in name for name in checkpoint["state_dict"])
    moments = checkpoint["optimizer_states"][0]["state"]
    assert len(moments) == len(checkpoint["state_dict"])


def test_a_killed_run_ends_as_an_uninterrupted_one(lora_job):
    stages = {"tune": STAGE, "more": {**STAGE, "samples": 16, "resolution": 24}}
    whole, killed = lora_job("whole", **stages), lora_job("killed", **stages)
    assert run_job(check_job(whole)) == 0
    for step, stage in ((3, "tune"), (2, "more")):
        with crashing_at(step, stage):
            run_job(check_job(killed))
    assert run_job(check_job(killed)) == 0
    one, other = (load_file(final(config) / "adapter_model.safetensors") for config in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_lycoris_is_trained_killed_drawn_and_merged_as_a_lora_is(lora_job, base, kind, tmp_path):
    whole, killed = lora_job("whole"), lora_job("killed")
    for config in (whole, killed):
        config["adapter"] = {"_target_": "hdm_lightning.LyCORIS", "kind": kind, "rank": RANK, "alpha": 3.0}
    assert run_job(check_job(whole)) == 0
    with crashing_at(3, "tune"):
        run_job(check_job(killed))
    assert run_job(check_job(killed)) == 0
    one, other = (load_file(final(config) / "adapter_model.safetensors") for config in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    adapter = read_adapter(final(whole))
    assert {layer.kind for layer in adapter.layers.values()} == {kind.upper()}
    assert all(layer.scale == 1.5 and layer.delta().abs().max() > 0 for layer in adapter.layers.values())
    pipeline = HDMPipeline.from_pretrained(base)
    settings = {"seed": 3, "output_type": "latent", "num_inference_steps": 2}
    plain = pipeline("a star", **settings).images
    pipeline.load_lora_weights(final(whole))
    beside = pipeline("a star", **settings).images
    assert convert.main([whole["run_dir"], str(tmp_path / "merged")]) == 0
    summed = HDMPipeline.from_pretrained(tmp_path / "merged")("a star", **settings).images
    assert float((beside - summed).norm() / summed.norm()) < 1e-4 < float((beside - plain).norm() / plain.norm())


def test_a_run_does_not_go_on_over_another_base(lora_job, base, toy_job, tmp_path):
    config = lora_job()
    config["vae"]["name"] = str(base / "final/vae")
    with crashing_at(3):
        run_job(check_job(config))
    another = tmp_path / "another"
    other_seed = {**toy_job(another, px16={"samples": 16}), "seed": 1}
    assert run_job(check_job(other_seed)) == 0
    with pytest.raises(UserError, match="another base"):
        run_job(check_job({**config, "init": str(another)}))


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"init": None}, "init", "left to the model of init"),
        ({"init": "runs/nowhere"}, "init", "no model in runs/nowhere"),
        ({"adapter": {"rank": 0}}, "adapter.rank", "1 or more"),
        ({"adapter": {"targets": ["atention"]}}, "adapter.targets", "attention"),
        ({"adapter": {"targets": ["(("]}}, "adapter.targets", "not a valid pattern"),
        ({"adapter": {"dropout": 0.1}}, "adapter.dropout", "unknown key"),
        ({"model": {"decoder_blocks": 5}}, "model.decoder_blocks", "model.decoder_blocks=null"),
        ({"text_encoder": {"layer": -2}}, "text_encoder.layer", "text_encoder.layer=null"),
        ({"module": {"rule": "mup"}}, "module.rule", "constant"),
        ({"text_encoder": {"whiten_captions": 8}}, "text_encoder.whiten_captions", "set it to 0"),
        ({"trainer": {"strategy": "fsdp2", "accelerator": "cpu"}}, "trainer.strategy", "ddp"),
    ],
)
def test_what_does_not_go_with_an_adapter_is_told_first(lora_job, changed, changes, where, words):
    with pytest.raises(UserError) as refused:
        check_job(changed(lora_job(), **changes))
    assert refused.value.where == where
    assert words in str(refused.value)


def test_a_started_run_goes_on_without_init(lora_job, base):
    config = lora_job()
    first = check_job(config)
    with crashing_at(3):
        run_job(first)
    again = check_job({**config, "init": None})
    assert again.config.init == str(base) and again.config.model == first.config.model
    assert again.config.schedule == first.config.schedule and again.config.vae.name == first.config.vae.name


def test_captions_are_cut_as_the_base_s_were(lora_job):
    with pytest.raises(UserError, match="is 5, but the adapter's base was trained with 8") as refused:
        check_job(lora_job(tune={**STAGE, "context_length": 5, "resolution": 24}))
    assert refused.value.where == "schedule.stages.tune.context_length"


def test_encoders_are_those_of_the_base_or_copies_of_these(
    lora_job, base, tiny_text_encoder, tiny_autoencoder, tmp_path, changed
):
    other = shutil.copytree(tiny_text_encoder, tmp_path / "text")
    with pytest.raises(UserError, match="base was trained with") as refused:
        check_job(changed(lora_job(), text_encoder={"name": str(other)}))
    assert refused.value.where == "text_encoder.name" and "text_encoder.name=null" in refused.value.hint
    vae = shutil.copytree(base / "final" / "vae", tmp_path / "vae")
    check_job(changed(lora_job(), vae={"name": str(vae)}, text_encoder={"name": str(tiny_text_encoder)}))
    (file,) = vae.glob("*.safetensors")
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="base was trained with") as refused:
        check_job(changed(lora_job(), vae={"name": str(vae)}))
    assert refused.value.where == "vae.name" and "vae.name=null" in refused.value.hint


def test_an_autoencoder_is_no_base(lora_job, base):
    with pytest.raises(UserError, match="is an autoencoder"):
        check_job({**lora_job(), "init": str(base / "final" / "vae")})


def test_an_adapter_is_no_base(lora_job):
    config = lora_job()
    assert run_job(check_job(config)) == 0
    again = lora_job("again")
    with pytest.raises(UserError, match="is a LoRA, not a model") as refused:
        check_job({**again, "init": config["run_dir"]})
    assert "hdm-convert" in refused.value.hint
    described = json.loads((final(config) / "adapter_config.json").read_text())
    assert described["peft_type"] == "LORA" and described["r"] == RANK


def gradients(network, recomputed):
    prepare_network(network, activation_checkpointing=recomputed)
    network.zero_grad()
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    network.train()(latents, torch.tensor([0.3, 0.7]), context).square().mean().backward()
    return {name: each.grad.clone() for name, each in network.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("recomputed", [True, "selective"])
def test_blocks_that_are_run_again_give_an_adapter_its_gradients(recomputed):
    torch.manual_seed(0)
    sizes = {"width": 32, "mlp_width": 48, "heads": 2, "head_dim": 16, "context_width": 16, "depth": 1}
    network = LoRA(RANK)(XUT(XUTConfig(**sizes, decoder_blocks=1)))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    kept, again = gradients(network, False), gradients(network, recomputed)
    assert all(torch.equal(again[name], value) for name, value in kept.items())
    assert all(value.abs().max() > 0 for value in kept.values())


@pytest.mark.parametrize("target", ["LoRA", "LyCORIS"])
def test_two_processes_train_an_adapter_as_one_does(lora_job, target):
    """The same samples in every step; what differs is the order in which float32 is summed."""
    one, two = lora_job("one"), lora_job("two")
    for config in (one, two):
        config["adapter"] = {"_target_": f"hdm_lightning.{target}", "rank": RANK}
        config["optimizer"] = {"eps": 1e-3}  # small gradients would be scaled up with their rounding
    two["trainer"] = {**two["trainer"], "devices": 2}
    for config in (one, two):
        assert run_job(check_job(config)) == 0
    first, second = (load_file(final(config) / "adapter_model.safetensors") for config in (one, two))
    assert first.keys() == second.keys()
    moved = 0.0
    for name, value in first.items():
        assert torch.allclose(second[name], value, rtol=1e-3, atol=1e-5), name
        moved = max(moved, float(value.abs().max()))
    assert moved > 0
