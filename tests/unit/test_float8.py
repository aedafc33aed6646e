"""FP8 matrices: which layers they are, and what is said where the card or the library has none."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hdm_lightning.errors import UserError
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.training.strategies.float8 import require_float8, use_float8

CONFIG = XUTConfig(
    width=32, mlp_width=40, heads=2, head_dim=16, context_width=16, depth=1, blocks_before=1, blocks_after=0
)


class Converted(nn.Linear):
    """In place of torchao's layer."""


def convert(module, *, config, module_filter_fn):
    assert config.pad_inner_dim  # rows are as many as they are
    for name, child in module.named_modules():
        for key, layer in child.named_children():
            if isinstance(layer, nn.Linear) and module_filter_fn(layer, f"{name}.{key}"):
                made = Converted(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
                made.weight, made.bias = layer.weight, layer.bias
                setattr(child, key, made)


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules,
        "torchao.float8",
        SimpleNamespace(convert_to_float8_training=convert, Float8LinearConfig=SimpleNamespace),
    )


def test_the_blocks_matrices_are_converted_once_and_nothing_else(library):
    network = XUT(CONFIG)
    names, weights = list(network.state_dict()), dict(network.named_parameters())
    for _ in range(2):
        use_float8(network)
        found = {name: layer for name, layer in network.named_modules() if isinstance(layer, Converted)}
    # 40 is no multiple of 16, so that the second matrix of every SwiGLU stays, 80 is one.
    layers = ("self_attention.qkv", "self_attention.output", "feed_forward.input")
    reading = ("cross_attention.query", "cross_attention.key_value", "cross_attention.output")
    blocks = {"blocks_before.0": layers, "encoder.0.0": layers, "decoder.0.0": (*layers, *reading)}
    blocks |= {f"decoder.0.{number}": layers for number in range(1, CONFIG.decoder_blocks)}
    assert set(found) == {f"{block}.{layer}" for block, own in blocks.items() for layer in own}
    assert list(network.state_dict()) == names
    assert all(parameter is weights[name] for name, parameter in network.named_parameters())


@pytest.mark.parametrize(
    ("capability", "possible"), [((7, 5), False), ((8, 6), False), ((8, 9), True), ((12, 0), True)]
)
def test_a_card_without_it_is_named(monkeypatch, library, capability, possible):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "RTX 3090")
    if possible:
        require_float8("cuda")
        return
    with pytest.raises(UserError, match=r"RTX 3090 .*8\.9") as caught:
        require_float8("cuda")
    assert caught.value.where == "hardware.float8"


def test_a_cpu_and_a_missing_library_are_named(monkeypatch):
    with pytest.raises(UserError, match="CPU"):
        require_float8("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    for call in (lambda: require_float8("cuda"), lambda: use_float8(XUT(CONFIG))):
        with pytest.raises(UserError, match="torchao") as caught:
            call()
        assert "hdm-lightning[lowbit]" in caught.value.hint


def test_frozen_matrices_stay(library):
    """An adapter's base has no gradient that could be had for less."""
    network = XUT(CONFIG).requires_grad_(False)
    network.blocks_before[0].self_attention.qkv.requires_grad_(True)
    use_float8(network)
    found = [name for name, layer in network.named_modules() if isinstance(layer, Converted)]
    assert found == ["blocks_before.0.self_attention.qkv"]
