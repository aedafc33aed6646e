"""Adapters of somebody else's, damaged or odd: a UserError names the file, and nothing in it takes for ever."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from hdm_lightning.errors import UserError
from hdm_lightning.generation.pipeline_adapters import AdapterUse
from hdm_lightning.interop.adapter_files import (
    BASE,
    CARD,
    CONFIG,
    WEIGHTS,
    for_others,
    is_adapter,
    read_adapter,
    write_adapter_file,
    write_adapter_folder,
)
from hdm_lightning.interop.adapter_layers import LowRank
from hdm_lightning.interop.adapters import Adapter, Base, check_adapter, merged

DOWN, UP = "base_model.model.a.b.lora_A.weight", "base_model.model.a.b.lora_B.weight"
NAN = torch.full((2, 4), float("nan"))


@pytest.fixture
def folder(tmp_path):
    """Function that makes peft's folder with a rank of 2 and alpha of 6, its configuration and tensors changed."""

    def make(tensors=None, **changes):
        (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, **changes}))
        save_file({DOWN: torch.ones(2, 4), UP: torch.ones(3, 2), **(tensors or {})}, tmp_path / WEIGHTS)
        return tmp_path

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": None},
        {"r": 10**400},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "6"},
        {"peft_type": None},
        {"peft_type": {"LORA": 1}},
        {"peft_type": ["LORA"]},
        {"base_model_name_or_path": 5},
        {"rank_pattern": [3]},
        {"rank_pattern": {"(": 3}},
        {"rank_pattern": {"a.b": 0}},
        {"alpha_pattern": {"(a|a)*c": 3}},
        {"alpha_pattern": {r"layers\.\d+": 3}},
    ],
)
def test_odd_configurations_are_named(folder, changes):
    with pytest.raises(UserError, match=CONFIG):
        read_adapter(folder(**changes))


@pytest.mark.parametrize("key", ["a.b", r"a\.b", "b", "^a.b", r"^a\.b"])
def test_patterns_that_are_names_give_their_layers_alpha(folder, key):
    assert read_adapter(folder(alpha_pattern={"c": 1, key: 5})).layers["a.b"].alpha == pytest.approx(5)


@pytest.mark.parametrize("key", ["^b", ".b", "a", "aXb", "x.a.b"])
def test_patterns_of_other_layers_do_not(folder, key):
    assert read_adapter(folder(alpha_pattern={key: 5})).layers["a.b"].alpha == pytest.approx(6)


@pytest.mark.parametrize("key", ["network.a.b", r"network\.a\.b", r"^network\.a\.b", "a.b"])
def test_patterns_of_an_adapter_of_the_whole_transformer_have_its_prefix(tmp_path, key):
    """As peft writes it for `pipeline.transformer`, whose layers are all below `network`."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {key: 2}, "alpha_pattern": {key: 5}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    named = {name.replace("model.a", "model.network.a"): name for name in (DOWN, UP)}
    save_file(dict(zip(named, (torch.ones(2, 4), torch.ones(3, 2)), strict=True)), tmp_path / WEIGHTS)
    assert read_adapter(tmp_path).layers["a.b"].scale == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "olora"}, "changed base weights"),
        ({"modules_to_save": ["a"]}, "modules_to_save"),
        ({"bias": "all"}, "LORA"),
        ({"peft_type": "VERA"}, "VERA"),
    ],
)
def test_forms_that_compute_something_else_are_refused(folder, changes, word):
    with pytest.raises(UserError, match=word):
        read_adapter(folder(**changes))
    assert read_adapter(folder(init_lora_weights="gaussian", use_dora=False)).layers


@pytest.mark.parametrize(("text", "name", "weight"), [("a:0.7", "a", 0.7), ("a:-1e-1", "a", -0.1), ("a:b", "a:b", 1.0)])
def test_names_and_weights_of_adapters(text, name, weight):
    assert AdapterUse.parse(text) == AdapterUse(name, weight)


@pytest.mark.parametrize("text", ["a:1e999", "a:-1e999", "a:nan", "a:inf", "a:-Infinity", ":0.7", ""])
def test_weights_that_are_no_numbers_are_refused(text):
    with pytest.raises(UserError, match="--lora"):
        AdapterUse.parse(text)


def test_a_path_with_a_colon_is_a_name(tmp_path):
    (tmp_path / "ink:2").mkdir()
    assert AdapterUse.parse(f"{tmp_path}/ink:2") == AdapterUse(f"{tmp_path}/ink:2")


def test_alpha_follows_the_root_of_the_rank_where_peft_says_so(folder):
    assert read_adapter(folder(use_rslora=True)).layers["a.b"].scale == pytest.approx(6 / 2**0.5)


@pytest.mark.parametrize("name", [CONFIG, BASE])
@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"base": {"name": 5}, "settings": []}', "\udc80"])
def test_odd_json_is_named(folder, name, content):
    path = folder()
    (path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=name):
        read_adapter(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {DOWN: torch.tensor(1.0)},
        {DOWN: torch.ones(0, 4), UP: torch.ones(3, 0)},
        {UP: torch.ones(4, 3)},
        {DOWN: torch.ones(2, 4, 1, 1)},
        {DOWN: torch.ones(2, 4, dtype=torch.int32)},
        {"base_model.model.a.b.alpha": torch.ones(3)},
        {"base_model.model.a.b.alpha": torch.tensor(float("inf"))},
        {DOWN: NAN},
    ],
)
def test_odd_tensors_are_named(folder, tensors):
    with pytest.raises(UserError, match=r"a\.b"):
        read_adapter(folder(tensors))


@pytest.mark.parametrize("record", ["[" * 100_000, "[]", "{", '{"base": {"name": 5}}', '{"base": {}, "settings": []}'])
def test_odd_records_of_single_files_are_named(tmp_path, record):
    path = tmp_path / "one.safetensors"
    save_file({DOWN: torch.ones(2, 4), UP: torch.ones(3, 2)}, path, {"hdm_lightning_adapter": record})
    with pytest.raises(UserError, match="one"):
        read_adapter(path)


def test_a_sum_beyond_float16_is_refused():
    layer = LowRank.of(torch.full((1, 2), 300.0), torch.full((2, 1), 300.0), 1.0)  # 90,000 each
    adapter = Adapter({"a": layer})
    state = {"a.weight": torch.zeros(2, 2)}
    assert torch.equal(merged(state, [(adapter, 1.0)])["a.weight"], torch.full((2, 2), 90_000.0))
    half = {"a.weight": torch.zeros(2, 2, dtype=torch.float16)}
    assert torch.equal(merged(half, [(adapter, 0.5)])["a.weight"].float(), torch.full((2, 2), 44_992.0))
    with pytest.raises(UserError, match=r"a\.weight"):
        merged(half, [(adapter, 1.0)])


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 2, 3, 3)])
def test_a_layer_of_another_shape_is_named(shape):
    adapter = Adapter({"norm": LowRank.of(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    with pytest.raises(UserError, match=f"norm is 2x2 there, {'x'.join(map(str, shape))} in this one"):
        check_adapter(adapter, {"norm.weight": torch.ones(shape)}, where="--lora x")


def test_what_is_a_lora_does_not_stand_in_its_name(tmp_path):
    adapter = Adapter({"a": LowRank.of(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    write_adapter_file(tmp_path / "one.safetensors", adapter, "lora")
    (tmp_path / "one").write_bytes((tmp_path / "one.safetensors").read_bytes())
    (tmp_path / "text.safetensors").write_text("lora_A.weight")
    assert is_adapter(tmp_path / "one.safetensors") and is_adapter(tmp_path / "one")
    assert not is_adapter(tmp_path / "text.safetensors") and not is_adapter(tmp_path)
    assert read_adapter(tmp_path / "one").layers.keys() == {"a"}


def test_an_adapter_for_others_names_no_folder_of_this_machine(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = read_adapter(folder())
    for name, told in {
        "/home/me/runs/mine/final": "final",
        str(tmp_path / "runs/mine"): "runs/mine",
        "OWNER/NAME": "OWNER/NAME",
        None: None,
    }.items():
        assert for_others(replace(given, base=Base(name, "0" * 64))).base == Base(told, "0" * 64)


def test_the_command_on_the_card_works_with_any_path(tmp_path):
    layers = {"a": LowRank.of(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    write_adapter_folder(tmp_path / "my ink", Adapter(layers, Base("/runs/my base")))
    (command,) = [line for line in (tmp_path / "my ink" / CARD).read_text().splitlines() if line.startswith("hdm-")]
    assert shlex.split(command) == ["hdm-sample", "/runs/my base", "a prompt", "--lora", str(tmp_path / "my ink")]
