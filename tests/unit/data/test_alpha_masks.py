"""Transparency as what counts in the loss: from files and masks to the weight of a latent cell."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hdm_lightning import ShardDataModule
from hdm_lightning.data.alpha_masks import decode_masked, with_mask
from hdm_lightning.data.crops import Crop
from hdm_lightning.data.decode import decode
from hdm_lightning.datasets.folder import build_folder
from hdm_lightning.diffusion.flow import loss_per_sample
from hdm_lightning.errors import UserError
from hdm_lightning.training.modules.flow_step import loss_weight

SIDE = 32


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def half_transparent():
    """Noise whose right half is transparent, with colours of its own underneath."""
    values = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 4), dtype=np.uint8)
    values[:, : SIDE // 2, 3], values[:, SIDE // 2 :, 3] = 255, 0
    return Image.fromarray(values, "RGBA")


def whole(height, width):
    return Crop(top=0, left=0, height=height, width=width, full_height=height, full_width=width)


def test_colours_are_kept_under_the_mask():
    image = half_transparent()
    pixels, _ = decode_masked(saved(image), whole)
    assert np.array_equal(pixels, np.array(image).transpose(2, 0, 1))
    on_white, _ = decode(saved(image), whole)
    assert (on_white[:, :, SIDE // 2 :] == 255).all()


def test_a_picture_without_alpha_counts_whole_and_is_decoded_as_ever():
    data = saved(half_transparent().convert("RGB"), "JPEG")
    pixels, crop = decode_masked(data, whole)
    expected, same = decode(data, whole)
    assert np.array_equal(pixels[:3], expected) and (pixels[3] == 255).all() and crop == same


def test_a_mask_follows_the_resize_the_crop_and_the_mirror():
    part = Crop(top=4, left=0, height=8, width=16, full_height=16, full_width=16, flip=True)
    pixels, _ = decode_masked(saved(half_transparent()), lambda *_: part)
    assert pixels.shape == (4, 8, 16)
    assert (pixels[3, :, :6] == 0).all() and (pixels[3, :, 10:] == 255).all()


def test_the_weighted_loss_is_the_mean_over_what_counts():
    torch.manual_seed(0)
    prediction, target = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    weight = torch.ones(3, 1, 8, 8)
    weight[1, :, :, 4:] = 0
    weight[2] = 0
    found = loss_per_sample(prediction, target, weight)
    left = loss_per_sample(prediction[1:2, :, :, :4], target[1:2, :, :, :4])
    assert torch.allclose(found[:1], loss_per_sample(prediction, target)[:1])
    assert torch.allclose(found[1:2], left) and found[2] == 0


def test_the_weight_of_a_cell_is_the_share_of_its_pixels():
    image = torch.full((1, 4, 8, 8), 255, dtype=torch.uint8)
    image[0, 3, :, 2:] = 0
    assert loss_weight({"image": image}, 4)[0, 0].tolist() == [[0.5, 0.0]] * 2
    assert loss_weight({"image": image[:, :3]}, 4) is None
    assert loss_weight({"latent": image}, 4) is None


def test_a_mask_file_beside_a_picture_becomes_its_alpha(tmp_path):
    colours = Image.new("RGB", (SIDE, SIDE), (200, 30, 30))
    mask = Image.new("L", (SIDE // 4, SIDE // 4), 0)
    mask.paste(255, (0, 0, SIDE // 8, SIDE // 4))
    (tmp_path / "in").mkdir()
    colours.save(tmp_path / "in" / "one.png")
    mask.save(tmp_path / "in" / "one.mask.png")
    (tmp_path / "in" / "one.txt").write_text("a red square")
    report = build_folder(tmp_path / "in", tmp_path / "shards", processes=1)
    assert report.samples == 1 and not report.rejected
    data = ShardDataModule(
        str(tmp_path / "shards"),
        resolution=SIDE,
        batch_size=1,
        validation_samples=1,
        num_workers=0,
        lanes=1,
        alpha="mask",
    )
    data.prepare()
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (1, 4, SIDE, SIDE)
    assert (batch["image"][0, 3, :, : SIDE // 2] == 255).all() and (batch["image"][0, 3, :, SIDE // 2 :] == 0).all()
    assert (batch["image"][0, :3].float().mean(dim=(1, 2)) - torch.tensor([200.0, 30.0, 30.0])).abs().max() < 6


def test_masks_shrink_with_their_picture():
    colours, mask = saved(Image.new("RGB", (64, 48))), saved(Image.new("L", (8, 8), 255))
    made = Image.open(io.BytesIO(with_mask(colours, mask, short_side_px=24)))
    assert made.size == (32, 24)


def test_a_bad_value_is_refused():
    with pytest.raises(UserError, match="white or mask"):
        ShardDataModule("nowhere", resolution=16, batch_size=1, alpha="black")
