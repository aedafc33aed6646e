"""Adapters at drawing: alone and several with weights, in the pipeline, in `hdm-sample`, merged and exported."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hdm_lightning import HDMPipeline
from hdm_lightning.cli import convert, sample
from hdm_lightning.encoders import pretrained
from hdm_lightning.errors import UserError
from hdm_lightning.generation.image_files import read_record
from hdm_lightning.generation.loading import LoadOptions, load_pipeline
from hdm_lightning.generation.pipeline_adapters import AdapterUse
from hdm_lightning.interop.adapter_files import read_adapter, write_adapter_file, write_adapter_folder
from hdm_lightning.interop.adapter_layers import LowRank
from hdm_lightning.interop.adapter_tensors import named_tensors
from hdm_lightning.interop.adapters import Adapter, Base, merged, weights_sha256
from hdm_lightning.interop.peft_config import peft_config
from hdm_lightning.interop.pipeline_folder import read_pipeline_folder
from hdm_lightning.models import XUT
from hub import standing_in
from toy_run import CONFIG, shaken_state, write_final

DRAWN = {"height": 16, "width": 16, "steps": 2, "guidance_scale": 2.0}
LAYERS = ("decoder.0.0.cross_attention.key_value", "text_projection", "modulation.feed_forward.output")


@pytest.fixture(scope="module")
def state():
    return shaken_state(by=0.05)


@pytest.fixture(scope="module")
def base(tmp_path_factory, state, tiny_text_encoder, tiny_autoencoder):
    """A pipeline's folder."""
    folder = tmp_path_factory.mktemp("base") / "final"
    return write_final(folder, tiny_text_encoder, tiny_autoencoder, state, sampling=DRAWN)


@pytest.fixture(scope="module")
def adapter(state, base):
    """Function of a seed and of a scale that gives an adapter for the base, its layers of different ranks."""

    def draw(seed=0, scale=0.1):
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for number, name in enumerate(LAYERS):
            (out, size), rank = state[f"{name}.weight"].shape, number + 1
            down, up = (torch.randn(shape, generator=generator) for shape in ((rank, size), (out, rank)))
            layers[name] = LowRank.of(down, scale * up, 1.5 * rank if number else 1.0)
        return Adapter(layers, Base(str(base), weights_sha256(state)))

    return draw


def drawn(pipeline):
    """Latents: a decoder of random weights would magnify their rounding."""
    return pipeline("a red circle", seed=3, output_type="latent").images


def apart(found, expected):
    """How far apart two drawings are, as a share of the second."""
    return float((found - expected).norm() / expected.norm())


def with_weights(base, adapters):
    """What a pipeline draws whose network has the adapters in its weights."""
    pipeline = HDMPipeline.from_pretrained(base)
    network = pipeline.network
    network.load_state_dict(merged(network.state_dict(), adapters))
    return drawn(pipeline)


def test_adapters_draw_as_their_sum_in_the_weights(base, adapter, tmp_path):
    one, other = adapter(1), adapter(2)
    write_adapter_folder(tmp_path / "one", one)
    write_adapter_file(tmp_path / "other.safetensors", other, "lora")
    pipeline = HDMPipeline.from_pretrained(base)
    plain = drawn(pipeline)
    pipeline.load_lora_weights(tmp_path / "one", adapter_name="one")
    assert apart(drawn(pipeline), with_weights(base, [(one, 1.0)])) < 1e-4
    assert apart(drawn(pipeline), plain) > 1e-2
    pipeline.load_lora_weights(tmp_path / "other.safetensors")
    assert pipeline.get_list_adapters() == {"transformer": ["one", "other"]}
    pipeline.set_adapters(["one", "other"], [0.7, -0.4])
    assert apart(drawn(pipeline), with_weights(base, [(one, 0.7), (other, -0.4)])) < 1e-4
    pipeline.set_adapters(["one"], [0.0])
    assert torch.equal(drawn(pipeline), plain)
    pipeline.unload_lora_weights()
    assert torch.equal(drawn(pipeline), plain) and not pipeline.has_adapters


def test_merged_equals_the_adapter_in_float64(adapter, state):
    """peft's own layers, read from the folder, beside the sum in the weights."""
    torch.manual_seed(1)
    inputs = (torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 5, 16))
    inputs = tuple(value.double() for value in inputs)
    one = adapter(1).cast(torch.float64)
    exact = {name: value.double() for name, value in state.items()}
    summed = XUT(CONFIG).double()
    summed.load_state_dict(merged(exact, [(one, 1.0)]))
    beside = XUT(CONFIG).double()
    beside.load_state_dict(exact)
    described = {key: value for key, value in peft_config(one).items() if key != "peft_type"}
    inject_adapter_in_model(LoraConfig(**described), beside)
    set_peft_model_state_dict(beside, named_tensors(one.layers, ""))
    with torch.no_grad():
        difference = (summed(*inputs) - beside(*inputs)).abs().max()
        assert difference < 1e-12 and (summed(*inputs) - XUT(CONFIG).double()(*inputs)).abs().max() > 0.1


def test_peft_reads_the_folder(base, adapter, tmp_path):
    """With layers of different ranks and scales."""
    write_adapter_folder(tmp_path / "peft", adapter(1))
    torch.manual_seed(2)
    inputs = tuple(value.double() for value in (torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 5, 16)))
    expected = read_pipeline_folder(base).load_network().double()
    network = copy.deepcopy(expected)
    expected.load_state_dict(merged(expected.state_dict(), [(adapter(1).cast(torch.float64), 1.0)]))
    with torch.no_grad():
        found = PeftModel.from_pretrained(network, str(tmp_path / "peft")).double()(*inputs)
        assert (found - expected(*inputs)).abs().max() < 1e-12


@pytest.mark.parametrize("layout", ["peft", "lora", "lora_comfyui"])
def test_every_layout_is_read_back(adapter, tmp_path, layout):
    path, one = tmp_path / "lora.safetensors", adapter(1)
    write_adapter_folder(path, one) if layout == "peft" else write_adapter_file(path, one, layout)
    found = read_adapter(path)
    assert found.base == one.base and found.layers.keys() == one.layers.keys()
    assert all(torch.allclose(found.layers[name].delta(), one.layers[name].delta(), atol=1e-5) for name in LAYERS)


def test_diffusers_own_loader_takes_the_single_file(base, adapter, tmp_path):
    write_adapter_file(tmp_path / "lora.safetensors", adapter(1), "lora")
    pipeline = HDMPipeline.from_pretrained(base)
    pipeline.transformer.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix="transformer")
    assert apart(drawn(pipeline), with_weights(base, [(adapter(1), 1.0)])) < 1e-4


def test_names_with_underscores_and_alphas_are_read(adapter, tmp_path):
    tensors = {}
    for name, layer in adapter(1).layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
        tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, tmp_path / "kohya.safetensors")
    found = read_adapter(tmp_path / "kohya.safetensors", CONFIG)
    assert all(torch.equal(found.layers[name].delta(), layer.delta()) for name, layer in adapter(1).layers.items())


def test_another_network_s_and_another_base_s_are_refused(base, adapter, tmp_path):
    pipeline, one = HDMPipeline.from_pretrained(base), adapter(1)
    elsewhere = replace(one, base=Base("runs/elsewhere", "0" * 64))
    with pytest.raises(UserError, match="trained on another base") as refused:
        pipeline.load_lora_weights(elsewhere)
    assert "runs/elsewhere" in refused.value.hint and "any_base" in refused.value.hint
    pipeline.load_lora_weights(elsewhere, any_base=True)
    assert apart(drawn(pipeline), with_weights(base, [(one, 1.0)])) < 1e-4
    deeper = replace(one, layers={"decoder.7.0.self_attention.qkv": one.layers["text_projection"]})
    with pytest.raises(UserError, match=r"no layer decoder\.7"):
        pipeline.load_lora_weights(deeper, "deeper")
    wider = LowRank.of(torch.zeros(2, 24), torch.zeros(32, 2), 2.0)
    with pytest.raises(UserError, match="text_projection is 32x24 there, 32x16"):
        pipeline.load_lora_weights(replace(one, layers={"text_projection": wider}), "wider")
    save_file({"text_projection.weight": torch.zeros(2, 2)}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="not a plain LoRA"):
        pipeline.load_lora_weights(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="contains no adapter") as refused:
        pipeline.load_lora_weights(base)
    assert "a whole model" in refused.value.hint
    with pytest.raises(UserError, match="there is no such adapter"):
        pipeline.load_lora_weights(tmp_path / "nothing")
    with pytest.raises(UserError, match="has adapters loaded"):
        pipeline.save_pretrained(tmp_path / "saved")


def test_hdm_sample_draws_records_and_repeats(base, adapter, tmp_path, capsys):
    for seed in (1, 2):
        write_adapter_folder(tmp_path / str(seed), adapter(seed))
    options = [str(base), "a red circle", "--out", str(tmp_path / "out"), "--device", "cpu", "--seed", "3"]
    loras = ["--lora", f"{tmp_path / '1'}:0.7", "--lora", f"{tmp_path / '2'}:-.4"]
    assert sample.main([*options, *loras]) == 0
    first = tmp_path / "out" / "0000-a-red-circle-3.png"
    record = read_record(first)
    assert [(each["name"], each["weight"]) for each in record.loras] == [
        (str(tmp_path / "1"), 0.7),
        (str(tmp_path / "2"), -0.4),
    ]
    assert sample.main(["--repeat", str(first), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert first.read_bytes() == (tmp_path / "out" / "0001-a-red-circle-3.png").read_bytes()
    pipeline = HDMPipeline.from_pretrained(base)
    pipeline.use_adapters([AdapterUse(str(tmp_path / "1"), 0.7), AdapterUse(str(tmp_path / "2"), -0.4)])
    assert pipeline("a red circle", seed=3).images[0].tobytes() == Image.open(first).tobytes()
    assert "warning" not in capsys.readouterr().err
    write_adapter_folder(tmp_path / "1", adapter(5))
    assert sample.main(["--repeat", str(first), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "LoRA" in capsys.readouterr().err


def test_a_repetition_with_other_loras_or_weights_says_so(base, adapter, tmp_path, capsys):
    ink, flat = str(tmp_path / "ink"), str(tmp_path / "flat")
    write_adapter_folder(tmp_path / "ink", adapter(1))
    write_adapter_folder(tmp_path / "flat", adapter(2))
    options = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert sample.main([str(base), "a star", *options, "--lora", f"{ink}:0.7"]) == 0
    repeat = ["--repeat", str(tmp_path / "out" / "0000-a-star-0.png"), *options]
    for given, told in (
        ([str(base)], [f"{ink}:0.7"]),
        ([str(base), "--lora", f"{ink}:0.5"], [f"{ink}:0.5", f"{ink}:0.7"]),
        ([str(base), "--lora", f"{ink}:0.7", "--lora", flat], [f"{flat}:1"]),
        ([str(base), "--lora", f"{ink}:0.7"], []),
    ):
        capsys.readouterr()
        assert sample.main([*given, *repeat]) == 0
        warnings = [line for line in capsys.readouterr().err.splitlines() if "LoRA" in line]
        assert len(warnings) == len(told) and all(name in line for name, line in zip(told, warnings, strict=True))


def test_a_single_file_is_drawn_over_its_base_or_names_the_way(base, adapter, tmp_path, capsys):
    options = ["a star", "--out", str(tmp_path / "out"), "--device", "cpu"]
    file = tmp_path / "ink.safetensors"
    write_adapter_file(file, replace(adapter(1), settings={"sampling": DRAWN}), "lora")
    assert sample.main([str(file), *options]) == 0
    assert sample.main([str(base), *options, "--lora", str(file)]) == 0
    one, other = (tmp_path / "out" / f"000{number}-a-star-0.png" for number in range(2))
    assert Image.open(one).tobytes() == Image.open(other).tobytes()
    write_adapter_file(file, replace(adapter(1), base=Base()), "lora")
    capsys.readouterr()
    assert sample.main([str(file), *options]) == 2
    assert f"hdm-sample BASE --lora {file}" in capsys.readouterr().err
    write_adapter_file(file, replace(adapter(1), base=Base(str(file))), "lora")
    assert sample.main([str(file), *options]) == 2
    assert "is itself a LoRA" in capsys.readouterr().err


def test_what_is_told_of_a_base_is_told_with_its_lora(base, adapter, tmp_path):
    """A file that holds the network twice."""
    file = tmp_path / "twice.safetensors"
    assert convert.main([str(base), str(file)]) == 0
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    copies = {f"other.{name}": value.clone() for name, value in tensors.items() if not name.startswith("vae")}
    save_file({**tensors, **copies}, file, metadata)
    write_adapter_folder(tmp_path / "lora", replace(adapter(1), base=Base(str(file))))
    notice = load_pipeline(file, LoadOptions()).notice
    assert "more than once" in notice
    assert load_pipeline(tmp_path / "lora", LoadOptions(any_base=True)).notice == notice


def test_a_lora_on_the_hub_is_drawn_over_its_base(base, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "_unreachable", {})
    # A scale of 1 is folded into a file without rounding.
    layers = {name: replace(each, alpha=float(each.rank)) for name, each in adapter(1).layers.items()}
    own = replace(adapter(1), layers=layers, settings={"sampling": DRAWN})
    write_adapter_folder(tmp_path / "ink", own)
    write_adapter_file(tmp_path / "ink.safetensors", own, "lora")
    options = ["a star", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert sample.main([str(tmp_path / "ink"), *options]) == 0
    with standing_in(tmp_path / "cache") as hub:
        hub.files["me/ink"] = {path.name: path.read_bytes() for path in (tmp_path / "ink").iterdir()}
        hub.files["me/ink"]["README.md"] = b"---\nlicense: cc-by-4.0\n---\n"
        hub.files["me/one"] = {"ink.safetensors": (tmp_path / "ink.safetensors").read_bytes()}
        assert sample.main(["me/ink", *options]) == 0
        assert "me/ink is under cc-by-4.0" in capsys.readouterr().err
        assert sample.main(["me/one", *options]) == 0
    here, folder, file = (Image.open(path).tobytes() for path in sorted((tmp_path / "out").glob("0*.png")))
    assert here == folder == file


def test_options_that_a_lora_has_no_use_for_are_refused(base, adapter, tmp_path, capsys):
    folder = str(tmp_path / "lora")
    write_adapter_folder(tmp_path / "lora", adapter(1))
    assert sample.main([folder, "a star", "--device", "cpu", "--weights", "raw"]) == 2
    assert "--weights raw" in capsys.readouterr().err
    for option, *value in (
        ("--lora", folder),
        ("--vae", str(base / "vae")),
        ("--text-encoder", "x"),
        ("--average", "0.08"),
        ("--samples", "0"),
        ("--any-base",),
    ):
        assert convert.main([folder, str(tmp_path / "out"), "--to", "peft", option, *value]) == 2
        assert option in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_folder_of_a_lora_draws_by_itself_and_follows_its_base(base, adapter, tmp_path):
    folder = tmp_path / "runs" / "ink" / "final"
    gone = Base("/gone/runs/base/final", adapter(1).base.sha256)
    moved = replace(adapter(1), base=gone, settings={"sampling": DRAWN})
    write_adapter_folder(folder, moved)
    options = ["a red circle", "--out", str(tmp_path / "out"), "--device", "cpu", "--seed", "3"]
    assert sample.main([str(tmp_path / "runs" / "ink"), *options]) == 2
    (tmp_path / "runs" / "base").mkdir()
    (tmp_path / "runs" / "base" / "final").symlink_to(base)
    assert sample.main([str(tmp_path / "runs" / "ink"), *options]) == 0
    assert sample.main([str(base), *options, "--lora", str(folder)]) == 0
    one, other = (tmp_path / "out" / f"000{number}-a-red-circle-3.png" for number in range(2))
    assert Image.open(one).tobytes() == Image.open(other).tobytes()


def test_hdm_convert_merges_and_exports(base, adapter, tmp_path, capsys):
    folder = tmp_path / "lora"
    write_adapter_folder(folder, adapter(1))
    assert convert.main([str(folder), str(tmp_path / "merged")]) == 0
    found = read_pipeline_folder(tmp_path / "merged")
    expected = merged(read_pipeline_folder(base).load_network().state_dict(), [(adapter(1), 1.0)])
    assert all(torch.equal(value, expected[name]) for name, value in found.load_network().state_dict().items())
    assert found.training["merged"] == [{"lora": folder.name, "weight": 1.0}]
    assert convert.main([str(base), str(tmp_path / "half"), "--lora", f"{folder}:0.5"]) == 0
    half = read_pipeline_folder(tmp_path / "half").load_network().state_dict()
    key = "text_projection.weight"
    added = adapter(1).layers["text_projection"].delta().float()
    assert torch.allclose(2 * (expected[key] - half[key]), added, atol=1e-4)
    for layout in ("lora", "lora_comfyui"):
        assert convert.main([str(folder), str(tmp_path / f"{layout}.safetensors"), "--to", layout]) == 0
    names = load_file(tmp_path / "lora_comfyui.safetensors")
    assert "diffusion_model.text_projection.lora_A.weight" in names
    assert "transformer.network.text_projection.lora_B.weight" in load_file(tmp_path / "lora.safetensors")
    assert convert.main([str(tmp_path / "lora_comfyui.safetensors"), str(tmp_path / "back"), "--to", "peft"]) == 0
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    capsys.readouterr()
    assert convert.main([str(folder)]) == 0
    assert str(base) in capsys.readouterr().out
    assert convert.main([str(base), str(tmp_path / "no"), "--to", "peft"]) == 2
    assert "is not a LoRA" in capsys.readouterr().err
