"""Feature networks by name: preprocessing, transformers models, a CLIP, timm, and what is told when one is missing."""

import importlib
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.clip import clip_scores, load_clip
from hdm_lightning.evaluation.image_sets import Captioned, collect
from hdm_lightning.generation.feature_networks import load_feature_network, vision_preprocessing
from hdm_lightning.metrics.features import (
    FeatureNetwork,
    Preprocessing,
    middle_square,
    thumbnails,
    with_names_apart,
)

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def smooth(count, height, width):
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=random)
    large = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return (large * 255).round().to(torch.uint8)


PREPROCESSING = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "size": {"height": 24, "width": 24}}


def save_vision(folder, model, **preprocessing):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSING, **preprocessing}))
    return folder


def test_preprocessing_resizes_like_pillow_and_normalises():
    images = smooth(2, 50, 80)
    got = Preprocessing(24, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))(images)
    for row, image in enumerate(images):
        square = image.permute(1, 2, 0).numpy()[:, 15:65]
        pixels = np.asarray(Image.fromarray(square).resize((24, 24), Image.Resampling.BICUBIC)) / 255
        expected = (pixels - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
        assert np.abs(got[row].permute(1, 2, 0).numpy() - expected).max() < 0.03


def test_squares_and_thumbnails():
    images = torch.arange(2 * 3 * 4 * 7, dtype=torch.uint8).reshape(2, 3, 4, 7)
    assert torch.equal(middle_square(images), images[:, :, :, 1:5])
    assert torch.equal(middle_square(images.mT), images.mT[:, :, 1:5])
    assert torch.equal(thumbnails(images, 4), images[:, :, :, 1:5])
    flat = torch.full((1, 3, 64, 64), 77, dtype=torch.uint8)
    assert torch.equal(thumbnails(flat, 16), flat[:, :, :16, :16])


def test_transformers_networks_give_their_own_pooled_or_first_token(tmp_path):
    images = smooth(3, 24, 24)
    vit = ViTModel(ViTConfig(image_size=24, patch_size=8, **SMALL)).eval()
    dino = Dinov2Model(Dinov2Config(image_size=24, patch_size=8, **SMALL)).eval()
    for name, short, model in (("my-ViT", "my_vit", vit), ("dino", "dino", dino)):
        (tmp_path / name).mkdir()
        network = load_feature_network(str(save_vision(tmp_path / name, model)), CPU)
        prepared = (images.float() / 255 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor(
            [0.2, 0.25, 0.3]
        )[:, None, None]
        with torch.no_grad():
            expected = model(pixel_values=prepared).last_hidden_state[:, 0]
        torch.testing.assert_close(network(images), expected, atol=1e-5, rtol=1e-5)
        assert (network.name, network.width) == (short, 16)
        assert network.to_json()["preprocessing"]["side_px"] == 24


def test_crop_size_counts_where_the_model_crops(tmp_path):
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL))
    folder = save_vision(
        tmp_path, model, size={"shortest_edge": 20}, do_center_crop=True, crop_size={"height": 16, "width": 16}
    )
    assert load_feature_network(str(folder), CPU).preprocessing.side_px == 16


@pytest.mark.parametrize(
    "written",
    [
        "[" * 100_000,
        *(json.dumps({**PREPROCESSING, "size": size}) for size in (float("inf"), float("nan"), 0, 10**9, [], "x")),
        *(json.dumps({**PREPROCESSING, "image_std": std}) for std in ([0.2, 0.0, 0.2], [0.2, float("nan"), 0.2], [])),
        json.dumps({**PREPROCESSING, "image_mean": [float("inf")] * 3}),
    ],
)
def test_a_preprocessing_that_cannot_be_is_named(tmp_path, written):
    (tmp_path / "preprocessor_config.json").write_text(written)
    with pytest.raises(UserError, match="preprocessor_config"):
        vision_preprocessing(tmp_path)


@pytest.fixture
def clip_folder(tmp_path, tiny_text_encoder):
    from transformers import AutoTokenizer

    text = {**SMALL, "vocab_size": 32, "max_position_embeddings": 12, "eos_token_id": 2}
    vision = {**SMALL, "image_size": 24, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    AutoTokenizer.from_pretrained(tiny_text_encoder).save_pretrained(tmp_path)
    return save_vision(tmp_path, model)


def test_clip_scores_are_those_of_the_models_own_forward(clip_folder):
    judge = load_clip(str(clip_folder), CPU)
    images, captions = smooth(3, 24, 24), ["a red circle", "a small blue star on the left of a square", "dark"]
    got = clip_scores(judge.network(images), judge.text_features(captions))
    tokens = judge.tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = judge.model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=judge.network.preprocessing(images),
        )
    cosines = (output.logits_per_image / judge.model.logit_scale.exp()).diagonal()
    torch.testing.assert_close(got, 100 * cosines.clamp(min=0), atol=1e-3, rtol=1e-4)
    assert judge.context_length == 12


def test_a_clip_can_serve_as_feature_network(clip_folder):
    network = load_feature_network(str(clip_folder), CPU)
    assert network.width == 8
    assert torch.allclose(torch.nn.functional.normalize(network(smooth(2, 24, 24)), dim=1).norm(dim=1), torch.ones(2))


def test_a_model_of_pictures_alone_is_no_clip(tmp_path):
    folder = save_vision(tmp_path, ViTModel(ViTConfig(image_size=24, patch_size=8, **SMALL)))
    with pytest.raises(UserError, match="is not a model of images and texts"):
        load_clip(str(folder), CPU)


def test_a_clip_that_is_not_there_says_how_to_do_without_even_where_nothing_else_helps(monkeypatch):
    def lacking(*_, **__):
        raise UserError("contains no such folder")

    monkeypatch.setattr("hdm_lightning.evaluation.clip.locate_model", lacking)
    with pytest.raises(UserError) as caught:
        load_clip("py:nowhere", CPU)
    assert caught.value.hint.startswith("leave --clip out")
    assert UserError("no", hint="wait").hint_with("or go") == "wait; or go"


def test_networks_of_one_name_keep_their_features_apart(clip_folder):
    judge = load_clip(str(clip_folder), CPU)  # the same model as feature network and as judge of captions
    networks = [load_feature_network(str(clip_folder), CPU), judge.network]
    assert networks[0].name == networks[1].name
    plain, unit = with_names_apart(networks)
    assert (plain.name, unit.name) == (judge.name, f"{judge.name}_2")
    images = smooth(4, 24, 24)
    batches = [Captioned(part, ["a", "b"], ["1", "2"]) for part in images.split(2)]
    found = collect(batches, [plain, unit]).features
    torch.testing.assert_close(found[plain.name], networks[0](images))
    torch.testing.assert_close(found[unit.name].norm(dim=1), torch.ones(4))
    assert not torch.allclose(found[plain.name], found[unit.name])


def test_numbers_behind_names_are_themselves_not_taken():
    def named(name):
        return FeatureNetwork(name, "", 1, Preprocessing(None), lambda images: images)

    networks = with_names_apart([named(name) for name in ("a", "a_2", "a", "b", "a")])
    assert [network.name for network in networks] == ["a", "a_2", "a_3", "b", "a_4"]


class Timm(types.ModuleType):
    """As much of timm as is used, for machines without torchvision."""

    def __init__(self):
        super().__init__("timm")
        facts = {"input_size": (3, 20, 20), "mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "interpolation": "bilinear"}
        self.data = types.SimpleNamespace(resolve_model_data_config=lambda network: facts)

    def create_model(self, name, pretrained, num_classes):
        assert (pretrained, num_classes) == (True, 0)
        if name != "resnet_tiny":
            raise RuntimeError(f"Unknown model ({name})")
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def test_timm_networks_come_with_their_own_preprocessing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", Timm())
    network = load_feature_network("timm:resnet_tiny", CPU)
    assert (network.name, network.width, network.preprocessing.side_px) == ("resnet_tiny", 3, 20)
    flat = torch.full((1, 3, 40, 40), 51, dtype=torch.uint8)
    torch.testing.assert_close(network(flat), torch.tensor([[0.1, 0.0, -0.1]]))
    with pytest.raises(UserError, match=r"timm cannot load a pretrained 'other' \(Unknown model"):
        load_feature_network("timm:other", CPU)


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [("timm:x", "timm", "pip install timm"), ("inception", "torch_fidelity", r"hdm-lightning\[fid\]")],
)
def test_missing_packages_are_told_with_what_works_without(monkeypatch, name, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message) as error:
        load_feature_network(name, CPU)
    assert "efficientnet_lite0" in str(error.value)


def test_weights_of_inception_that_cannot_be_had_are_told(monkeypatch):
    def unreachable(name, features_list):
        raise OSError("no route to the host")

    importlib.import_module("torchmetrics.image.fid")  # which asks for the true package
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", unreachable)
    with pytest.raises(
        UserError, match=r"the weights of FID's network cannot be downloaded \(no route to the host\)"
    ) as error:
        load_feature_network("inception", CPU)
    assert "efficientnet_lite0" in str(error.value)


def test_pictures_none_of_which_can_be_read_are_told():
    with pytest.raises(UserError, match="none of the images looked at can be read"):
        collect([], [])
