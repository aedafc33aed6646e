"""LoHa and LoKr beside the packages that know them: lycoris-lora, whose files are read and written, and peft."""

import pytest
import torch
from lycoris import create_lycoris, create_lycoris_from_weights
from lycoris.functional import factorization
from peft import PeftModel
from safetensors.torch import save_file

from hdm_lightning import LyCORIS
from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_files import read_adapter, write_adapter_file, write_adapter_folder
from hdm_lightning.interop.adapter_layers import divisors
from hdm_lightning.interop.adapters import merged
from hdm_lightning.models.compiled_blocks import compile_blocks
from hdm_lightning.training.modules.low_rank import adapter_of
from hdm_lightning.training.strategies.parallelize import prepare_network
from toy_run import CONFIG, random_network

KINDS = {
    "loha": {"kind": "loha", "rank": 2},
    "loha of full rank": {"kind": "loha", "rank": 6},
    "lokr": {"kind": "lokr", "rank": 2},
    "lokr of whole factors": {"kind": "lokr", "rank": 16},
    "lokr of two pairs": {"kind": "lokr", "rank": 1, "decompose_both": True},
    "lokr of a factor": {"kind": "lokr", "rank": 2, "factor": 4},
}
TARGETS = ("attention", "feed_forward", "text_projection")


def inputs():
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return latents.double(), torch.tensor([0.3, 0.7]).double(), context.double()


def fresh():
    """A network whose blocks do something."""
    return random_network(CONFIG, std=0.15).double()


@torch.no_grad()
def filled(network):
    """The network with factors other than the first, of which some are zero."""
    generator = torch.Generator().manual_seed(2)
    for name, value in network.named_parameters():
        if "hada_" in name or "lokr_" in name:
            value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return network


@torch.no_grad()
def output(network):
    return network(*inputs())


def summed(adapter):
    """What a network computes that has the adapter in its weights."""
    network = fresh()
    network.load_state_dict(merged(network.state_dict(), [(adapter, 1.0)]))
    return output(network)


def test_sizes_are_split_as_lycoris_splits_them():
    for size in (*range(1, 130), 250, 360, 512, 1024, 1920, 2048, 3072, 5461):
        for factor in (-1, 1, 2, 4, 8, 12, 16, 100):
            assert divisors(size, factor) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_begins_as_it_was_and_trains_the_factors_alone(kind):
    network = fresh().float()
    latents, times, context = (value.float() for value in inputs())
    before = network(latents, times, context)
    LyCORIS(**KINDS[kind], targets=TARGETS)(network)
    assert torch.equal(network(latents, times, context), before)
    network.double()
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    assert trained and all("hada_" in name or "lokr_" in name for name in trained)
    network(*inputs()).square().mean().backward()
    assert all((value.grad is not None) == (name in trained) for name, value in network.named_parameters())
    assert any(value.grad.abs().max() > 0 for value in network.parameters() if value.grad is not None)
    parts = LyCORIS(**KINDS[kind], targets=TARGETS)
    sizes = [fresh().get_submodule(name).weight.shape for name in parts.layers(fresh())]
    counted = sum(parts.parameters_beside(size, out) for out, size in sizes)
    assert counted == sum(value.numel() for value in network.parameters() if value.requires_grad)


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_their_sum_in_the_weights_does(kind, alpha, tmp_path):
    network = filled(LyCORIS(**KINDS[kind], alpha=alpha, targets=TARGETS)(fresh()))
    adapter, found = adapter_of(network), output(network)
    assert (found - output(fresh())).abs().max() > 0.1
    assert torch.allclose(summed(adapter), found, atol=1e-12)
    assert torch.allclose(summed(adapter.low_rank()), found, atol=1e-12)
    write_adapter_file(tmp_path / "lora.safetensors", adapter, "lora")
    assert torch.allclose(summed(read_adapter(tmp_path / "lora.safetensors")), found, atol=1e-12)


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_folder(kind, alpha, tmp_path):
    network = filled(LyCORIS(**KINDS[kind], alpha=alpha, targets=TARGETS)(fresh()))
    adapter = adapter_of(network)
    write_adapter_folder(tmp_path, adapter)
    assert torch.allclose(summed(read_adapter(tmp_path)), output(network), atol=1e-12)
    beside = PeftModel.from_pretrained(fresh(), str(tmp_path), autocast_adapter_dtype=False)
    assert type(beside.peft_config["default"]).__name__.lower() == f"{KINDS[kind]['kind']}config"
    assert torch.allclose(output(beside), output(network), atol=1e-6)  # peft loads float64 as it is, but rounds scales


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_reads_the_file(kind, alpha, tmp_path):
    network = filled(LyCORIS(**KINDS[kind], alpha=alpha, targets=TARGETS)(fresh()))
    path = tmp_path / "one.safetensors"
    write_adapter_file(path, adapter_of(network), "lycoris")
    theirs = fresh().float()
    loaded, _ = create_lycoris_from_weights(1.0, str(path), theirs)
    loaded.apply_to()  # merge_to of 4.1.3 applies a scale twice
    with torch.no_grad():
        assert torch.allclose(theirs(*(value.float() for value in inputs())).double(), output(network), atol=1e-4)
    assert torch.allclose(summed(read_adapter(path, CONFIG)), output(network), atol=1e-12)


OPTIONS = {
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr"},
    "lokr of whole factors": {"algo": "lokr", "full_matrix": True},
    "lokr of two pairs": {"algo": "lokr", "decompose_both": True, "linear_dim": 1},
    "lokr of a factor, unbalanced": {"algo": "lokr", "factor": 4, "unbalanced_factorization": True},
    "lora": {"algo": "lora"},
    "rank-stabilised loha": {"algo": "loha", "rs_lora": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_file_of_lycoris_is_read(name, tmp_path):
    theirs = fresh().float()
    beside = create_lycoris(theirs, 1.0, **{"linear_dim": 2, "linear_alpha": 3.0, **OPTIONS[name]})
    beside.apply_to()
    torch.manual_seed(3)
    for value in beside.parameters():
        torch.nn.init.normal_(value, std=0.3)
    path = tmp_path / "one.safetensors"
    save_file({key: value.contiguous() for key, value in beside.state_dict().items()}, path)
    expected = theirs(*(value.float() for value in inputs())).detach()
    found = summed(read_adapter(path, CONFIG))
    assert (found - output(fresh())).abs().max() > 0.05
    assert torch.allclose(found.float(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"algo": "lokr", "dora_wd": True}, "DoRA"), ({"algo": "full"}, "full"), ({"algo": "diag-oft"}, "OFT")],
)
def test_what_lycoris_has_beyond_that_is_named(options, word, tmp_path):
    beside = create_lycoris(fresh().float(), 1.0, linear_dim=2, **options)
    beside.apply_to()
    path = tmp_path / "one.safetensors"
    save_file({key: value.contiguous() for key, value in beside.state_dict().items()}, path)
    with pytest.raises(UserError, match=word):
        read_adapter(path, CONFIG)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_blocks_can_be_compiled_whole_and_run_again(kind):
    """peft's layers of these kinds branch on a random number, which neither of the two allows."""
    found = {}
    for way in ("plain", "again", "compiled"):
        network = filled(LyCORIS(**KINDS[kind], targets=TARGETS)(fresh().float())).train()
        if way == "again":
            prepare_network(network, activation_checkpointing=True)
        if way == "compiled":
            compile_blocks(network)
        network(*(value.float() for value in inputs())).square().mean().backward()
        found[way] = {name: value.grad for name, value in network.named_parameters() if value.requires_grad}
    for name, value in found["plain"].items():
        assert torch.equal(found["again"][name], value)
        assert torch.allclose(found["compiled"][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.hada_w1_a": (3, 2)},
        {"a.lokr_w1": (2, 2)},
        {"a.lokr_w1": (2, 2), "a.lokr_w2": (2, 2), "a.lokr_w2_a": (2, 1), "a.lokr_w2_b": (1, 2)},
        {"a.lokr_w1": (2, 2), "a.lokr_w2_a": (2, 1), "a.lokr_w2_b": (2, 2)},
        {"a.lokr_w1_a": (2, 1), "a.lokr_w1_b": (1, 2), "a.lokr_w2_a": (2, 2), "a.lokr_w2_b": (2, 2)},
        {"a.lokr_w1": (2, 2), "a.lokr_w2": (2, 2), "a.lora_A.weight": (2, 2)},
        {"a.lokr_w1": (2, 2, 1), "a.lokr_w2": (2, 2)},
        {f"a.hada_w{number}_{end}": shape for number in (1, 2) for end, shape in (("a", (3, 2)), ("b", (3, 4)))},
    ],
)
def test_tensors_that_do_not_belong_together_are_named(tensors, tmp_path):
    path = tmp_path / "one.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(UserError, match=r"one\.safetensors.* a has "):
        read_adapter(path)
