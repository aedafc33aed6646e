"""Weight files as they come from elsewhere: any prefix, precision, name and wrapping is read; what is none is said."""

import argparse
import itertools
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hdm_lightning.cli.convert import main as convert
from hdm_lightning.errors import UserError
from hdm_lightning.interop import published, tensor_files
from hdm_lightning.interop.layouts import read_release
from hdm_lightning.interop.network_copies import one_network
from hdm_lightning.interop.tensor_files import read_tensors, write_tensors
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig
from hdm_lightning.training.initial_weights import load_initial_weights
from toy_run import random_network

CONFIG = XUTConfig(
    width=16, mlp_width=12, heads=1, head_dim=16, context_width=12, depth=1, decoder_blocks=1,
    blocks_after=1, **PUBLISHED,
)  # fmt: skip
WRAPPERS = (
    "_orig_mod.",
    "module.",
    "model.",
    "unet.",
    "transformer.",
    "diffusion_model.",
    "ema_model.",
    "net.",
    "näve.",
)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def network(seed: int = 0) -> XUT:
    return random_network(CONFIG, seed)


@pytest.fixture(scope="module")
def bare() -> dict[str, torch.Tensor]:
    return published.export_state_dict(network())


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def prefixes(count: int) -> list[str]:
    lot = random.Random(0)
    pairs = ["".join(pair) for pair in itertools.product(("", *WRAPPERS), repeat=2)]
    return pairs + ["".join(lot.choices(WRAPPERS, k=lot.randint(3, 5))) for _ in range(count - len(pairs))]


@pytest.mark.parametrize("names", ["published", "own"])
def test_whatever_stands_before_the_names_is_taken_off(bare, names):
    tensors = bare if names == "published" else network().state_dict()
    expected = network().state_dict()
    for prefix in prefixes(150):
        stored = {prefix + name: tensor for name, tensor in tensors.items()}
        stored |= {"step": torch.zeros(1)} if prefix.replace("_orig_mod.", "") else {}
        if names == "published":
            stored = published.unwrapped(stored)
            assert equal(published.load_xut(CONFIG, stored).state_dict(), expected), prefix
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("hdm_lightning.training.initial_weights.find_weights", lambda source: (Path(source),))
                patch.setattr("hdm_lightning.training.initial_weights.read_tensors", lambda path, s=stored: s)
                model = network(1)
                assert load_initial_weights(model, "x").missing == []
            assert equal(model.state_dict(), expected), prefix


def test_blocks_that_were_compiled_by_themselves_have_their_names_too(bare):
    stored = {name.replace(".attn.", "._orig_mod.attn."): tensor for name, tensor in bare.items()}
    assert stored.keys() != bare.keys()
    assert equal(published.load_xut(CONFIG, published.unwrapped(stored)).state_dict(), network().state_dict())


def test_of_two_networks_the_usual_one_counts_and_else_none(bare):
    other = {name: tensor + 1 for name, tensor in bare.items()}
    both = {f"ema.{n}": t for n, t in other.items()} | {f"unet.model.{n}": t for n, t in bare.items()}
    assert published.find_prefix(both) == "unet.model."
    unclear = {f"ema.{n}": t for n, t in other.items()} | {f"raw.{n}": t for n, t in bare.items()}
    with pytest.raises(ValueError, match=r"several networks, under 'ema\.', 'raw\.'"):
        published.find_prefix(unclear)


COPIES = {  # what stands before the names of the one that counts and of the other; None: it is in a mapping of its own
    "unet.model. and ema.": ("unet.model.", "ema."),
    "bare and ema.": ("", "ema."),
    "module. and ema.module.": ("module.", "ema.module."),
    "model. and ema_model.": ("model.", "ema_model."),
    "compiled": ("_orig_mod.", "average._orig_mod."),
}


@pytest.mark.parametrize("kind", [*COPIES, "state_dict and ema", "state_dict of module. and ema"])
def test_a_second_copy_of_the_network_is_said_and_can_be_had(bare, tmp_path, capsys, kind):
    path = tmp_path / "both.ckpt"
    other = {name: tensor + 1 for name, tensor in bare.items()}
    if kind in COPIES:
        first, second = COPIES[kind]
        torch.save({f"{first}{n}": t for n, t in bare.items()} | {f"{second}{n}": t for n, t in other.items()}, path)
        name = second.replace("_orig_mod.", "").rstrip(".")
    else:
        wrapper, name = ("module." if "module" in kind else ""), "ema"
        sets = {"state_dict": bare, "ema": other, "optimizer": {"exp_avg": torch.ones(2)}}
        torch.save({key: {f"{wrapper}{n}": t for n, t in each.items()} for key, each in sets.items()}, path)
        name = f"ema.{wrapper}".rstrip(".")
    assert equal(read_release(path).network.state_dict(), network().state_dict())
    assert convert([str(path)]) == 0
    told = capsys.readouterr().err
    assert f"not read: {name} " in told and f"hdm-convert {path} OUT --copy {name}" in told
    model = network(1)
    assert f"--copy {name}" in str(load_initial_weights(model, str(path)))
    assert equal(model.state_dict(), network().state_dict())
    out = tmp_path / "out.safetensors"
    assert convert([str(path), str(out), "--to", "bare", "--copy", name]) == 0  # as it was told
    assert capsys.readouterr().err == ""
    found = read_tensors(out)
    assert found.keys() == bare.keys()
    assert all(torch.equal(found[each], other[each]) for each in bare if each != "time_emb.freqs")
    assert convert([str(path), str(tmp_path / "no.safetensors"), "--copy", "another"]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mappings", "prefixes"])
def test_of_copies_none_of_which_is_the_usual_one_none_is_taken(bare, tmp_path, capsys, kind):
    path, other = tmp_path / "both.pt", {name: tensor + 1 for name, tensor in bare.items()}
    named = {"first": bare, "second": other}
    torch.save(
        named if kind == "mappings" else {f"{k}.{n}": t for k, each in named.items() for n, t in each.items()}, path
    )
    assert convert([str(path)]) == 2
    assert "--copy first" in capsys.readouterr().err
    with pytest.raises(UserError, match="several"):
        load_initial_weights(network(1), str(path))
    out = tmp_path / "out.safetensors"
    assert convert([str(path), str(out), "--to", "bare", "--copy", "second"]) == 0
    found = read_tensors(out)
    assert all(torch.equal(found[each], other[each]) for each in bare if each != "time_emb.freqs")


def test_another_model_beside_a_network_is_no_copy_of_it(bare):
    """Its names begin as an XUT's may, as an image encoder's with `patch_embedding`, and it has as many."""
    vision = {f"vision.{name}": torch.ones(1) for name in ("patch_embedding.weight", *map(str, range(len(bare))))}
    both = {f"diffusion.{name}": tensor for name, tensor in bare.items()} | vision
    found, copies = one_network(both, where="both.pt")
    assert found.keys() == both.keys() and copies == ()
    with pytest.raises(UserError, match="several networks"):
        one_network(both | {f"average.{name}": tensor for name, tensor in bare.items()}, where="both.pt")


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_every_precision_is_cast_to_every_other(bare, tmp_path, dtype, target):
    lot = random.Random(0)
    source = tmp_path / "source.safetensors"
    mixed = {n: (t.to(dtype) if lot.random() < 0.7 else t.to(torch.bfloat16)) for n, t in bare.items()}
    save_file(mixed, source)
    assert convert([str(source), str(tmp_path / "out.safetensors"), "--to", "bare", "--dtype", target]) == 0
    found = read_tensors(tmp_path / "out.safetensors")
    for name, tensor in mixed.items():
        if name != "time_emb.freqs":  # restored to what its formula gives
            assert torch.equal(found[name], tensor.to(getattr(torch, target))), name


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".SAFETENSORS", "", ".sft", ".weights"])
@pytest.mark.parametrize("kind", ["safetensors", "flat", "state_dict", "module", "legacy"])
def test_a_file_is_what_it_holds_whatever_its_name(bare, tmp_path, kind, suffix):
    path = tmp_path / f"größe.v1{suffix}"
    if kind == "safetensors":
        save_file(bare, path)
    elif kind == "legacy":
        torch.save(bare, path, _use_new_zipfile_serialization=False)
    else:
        inside = {"flat": bare, "state_dict": {"state_dict": bare, "ema": {"x": torch.ones(1)}, "epoch": 1}}
        inside["module"] = {"module": bare, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "step": 5}
        torch.save(inside[kind], path)
    assert equal(read_tensors(path), bare)
    assert equal(read_release(path).network.state_dict(), network().state_dict())


def test_several_sets_in_one_file_are_named(bare, tmp_path):
    torch.save({"model": bare, "ema": bare}, tmp_path / "two.pt")
    with pytest.raises(UserError, match=rf"model \({len(bare)}\), ema \({len(bare)}\)"):
        read_tensors(tmp_path / "two.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *FLOAT8])
def test_weights_that_are_no_numbers_are_named_wherever_they_are_read(bare, tmp_path, value, dtype):
    if not torch.tensor([value]).to(dtype).float().isfinite().all():
        name = random.Random(str(dtype)).choice([n for n in bare if bare[n].dim() == 2])
        broken = {n: t.to(dtype, copy=True) for n, t in bare.items()}
        broken[name].view(-1)[3] = torch.tensor(value).to(dtype)
        path = tmp_path / "nan.safetensors"
        write_tensors(path, broken)
        with pytest.raises(UserError, match=rf"not finite \(1\): {name}"):
            read_release(path)
        with pytest.raises(UserError, match=r"NaN or infinity"):
            load_initial_weights(network(1), str(path))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
PLACEHOLDERS = {
    "pointer": (LFS, "Git LFS", "git lfs pull"),
    "page": (b"\xef\xbb\xbf \n<!DOCTYPE html><html>Access denied</html>", "HTML or XML page", "download"),
    "answer": (b'{"error": "Repository not found"}', "JSON", "download"),
    "empty": (b"", "empty", "download"),
    "zeros": (bytes(5000), "zeros", "download"),
    "gzip": (b"\x1f\x8b\x08\x00aaaa", "gzip", "gunzip"),
    "other": (b"RIFF....WEBP", "neither a safetensors nor a torch file", "download"),
    "text": (b"no header", "neither a safetensors nor a torch file", "download"),
    "no zip": (b"PK no zip", "not a complete torch file", "download"),
    "gguf": (b"GGUF\3", "llama.cpp", ".safetensors"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin", ".gguf"])
@pytest.mark.parametrize("kind", PLACEHOLDERS)
def test_what_was_saved_in_the_place_of_weights_is_recognised(tmp_path, kind, suffix):
    content, what, hint = PLACEHOLDERS[kind]
    (tmp_path / f"model{suffix}").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_release(tmp_path / f"model{suffix}")
    assert what in caught.value.what and hint in str(caught.value.hint)
    assert caught.value.where == str(tmp_path / f"model{suffix}")
    with pytest.raises(UserError, match="no such file or folder"):
        read_release(tmp_path / "nothing")


class Evil:
    def __reduce__(self):
        return pytest.fail, ("code in the file was run",)


@pytest.mark.parametrize(
    ("more", "named"),
    [(argparse.Namespace(rate=1), "argparse.Namespace"), (np.float64(1), "numpy"), (Evil(), "Fail")],
)
def test_what_would_have_to_run_is_named_and_torch_s_advice_left_out(bare, tmp_path, more, named):
    torch.save({"state_dict": bare, "hyper_parameters": more}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="more than tensors") as caught:
        read_release(tmp_path / "a.ckpt")
    assert named in str(caught.value) and caught.value.where == str(tmp_path / "a.ckpt")
    assert not any(word in str(caught.value) for word in ("weights_only", "trust", "\x1b", "torch.load"))


@pytest.mark.parametrize("written", ["{not json", "[1]", "null", '{"text_encoder": 3}', '{"sampling": []}', "[" * 9999])
def test_broken_metadata_of_ours_is_a_mistake_of_the_file(bare, tmp_path, written, capsys):
    save_file(bare, tmp_path / "a.safetensors", metadata={"hdm_lightning": written})
    assert convert([str(tmp_path / "a.safetensors")]) == 2
    assert "broken metadata hdm_lightning" in capsys.readouterr().err
    save_file(bare, tmp_path / "a.safetensors", metadata={"modelspec.title": written, "ss_tag_frequency": "{"})
    assert convert([str(tmp_path / "a.safetensors")]) == 0


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("repeated", [b"]", b"(", b"N0", b")2\x86"])
def test_a_pickle_of_millions_of_steps_is_not_taken_up(tmp_path, zipped, repeated):
    """Torch's reader needs minutes for tens of millions of brackets in each other, and all memory."""
    path, body = tmp_path / "a.pt", b"\x80\x02" + repeated * (3_000_000 // len(repeated)) + b"."
    if zipped:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", body)
            archive.writestr("a/version", "3\n")
    else:
        path.write_bytes(body)
    with pytest.raises(UserError, match="more than 2,000,000 entries") as caught:
        read_tensors(path)
    assert caught.value.where == str(path)


def test_what_is_beside_the_tensors_is_bounded_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    monkeypatch.setattr(tensor_files, "_LONGEST_PICKLE", 1000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1001))
    with pytest.raises(UserError, match="1,001 bytes besides its tensors"):
        read_tensors(path)


def test_a_zip_of_other_things_is_no_file_of_weights(bare, tmp_path):
    save_file(bare, tmp_path / "a.safetensors")
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.write(tmp_path / "a.safetensors", "a.safetensors")
    with pytest.raises(UserError, match="not a complete torch file"):
        read_tensors(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "gone.safetensors"}}']
)
def test_a_broken_index_of_parts_is_named(bare, tmp_path, index):
    write_tensors(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", bare)
    shutil.copytree(tmp_path / "unet", tmp_path / "broken")
    (tmp_path / "broken" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "broken" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError) as caught:
        read_release(tmp_path / "broken")
    assert str(tmp_path / "broken") in str(caught.value.where)


def test_a_description_of_more_blocks_than_there_are_tensors_builds_none(bare, tmp_path):
    from hdm_lightning.interop.pipeline_folder import network_from_tensors

    with pytest.raises(ValueError, match="describes 10000002 blocks"):
        network_from_tensors(XUTConfig.from_json({**CONFIG.to_json(), "depth": 5_000_000}), network().state_dict())
