"""Transparency as what counts in the loss: from files and masks to the weight of a latent cell."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hdm_lightning import ShardDataModule
from hdm_lightning.data.alpha_masks import decode_masked, shrunk, with_mask
from hdm_lightning.data.crops import Crop
from hdm_lightning.data.decode import decode
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.loader import largest_sample_bytes
from hdm_lightning.datasets.folder import build_folder
from hdm_lightning.datasets.source_images import ImageOptions, image_field
from hdm_lightning.diffusion.flow import loss_per_sample
from hdm_lightning.errors import UserError
from hdm_lightning.training.modules.flow_step import loss_weight

SIDE = 32


def half_transparent():
    """Noise whose right half is transparent, with colours of its own underneath."""
    values = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 4), dtype=np.uint8)
    values[:, : SIDE // 2, 3], values[:, SIDE // 2 :, 3] = 255, 0
    return Image.fromarray(values, "RGBA")


def whole(height, width):
    return Crop(top=0, left=0, height=height, width=width, full_height=height, full_width=width)


def test_colours_are_kept_under_the_mask(kit):
    image = half_transparent()
    pixels, _ = decode_masked(kit.encoded(image), whole)
    assert np.array_equal(pixels, np.array(image).transpose(2, 0, 1))
    on_white, _ = decode(kit.encoded(image), whole)
    assert (on_white[:, :, SIDE // 2 :] == 255).all()


def test_a_picture_without_alpha_counts_whole_and_is_decoded_as_ever(kit):
    data = kit.encoded(half_transparent().convert("RGB"), "JPEG")
    pixels, crop = decode_masked(data, whole)
    expected, same = decode(data, whole)
    assert np.array_equal(pixels[:3], expected) and (pixels[3] == 255).all() and crop == same


def test_a_mask_follows_the_resize_the_crop_and_the_mirror(kit):
    part = Crop(top=4, left=0, height=8, width=16, full_height=16, full_width=16, flip=True)
    pixels, _ = decode_masked(kit.encoded(half_transparent()), lambda *_: part)
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
    assert largest_sample_bytes(data.train_dataloader().config, data.train_plan) == batch["image"].nbytes
    assert (batch["image"][0, 3, :, : SIDE // 2] == 255).all() and (batch["image"][0, 3, :, SIDE // 2 :] == 0).all()
    assert (batch["image"][0, :3].float().mean(dim=(1, 2)) - torch.tensor([200.0, 30.0, 30.0])).abs().max() < 6


def test_masks_shrink_with_their_picture(kit):
    colours, mask = kit.encoded(Image.new("RGB", (64, 48))), kit.encoded(Image.new("L", (8, 8), 255))
    ((_, data),) = image_field(colours, ImageOptions(short_side_px=24), mask).items()
    assert Image.open(io.BytesIO(data)).size == (32, 24)


def flat_half_transparent():
    """Red, whose right half is transparent blue."""
    image = Image.new("RGBA", (SIDE * 2, SIDE * 2), (200, 30, 30, 255))
    image.paste((30, 30, 200, 0), (SIDE, 0, SIDE * 2, SIDE * 2))
    return image


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", ImageOptions(short_side_px=SIDE)),
        ("PNG", ImageOptions(encoding="webp")),
        ("TIFF", ImageOptions()),
        ("TIFF", ImageOptions(short_side_px=SIDE)),
        ("PNG", ImageOptions()),
    ],
)
def test_transparency_outlives_the_encoding(kit, kind, options):
    ((_, data),) = image_field(kit.encoded(flat_half_transparent(), kind), options).items()
    pixels, _ = decode_masked(data, whole)
    half = pixels.shape[2] // 2
    edge = half // 4  # shrinking and lossy colours blur what meets
    assert (pixels[3, :, : half - edge] == 255).all() and (pixels[3, :, half + edge :] == 0).all()
    for part, colour in ((pixels[:3, :, : half - edge], (200, 30, 30)), (pixels[:3, :, half + edge :], (30, 30, 200))):
        assert np.abs(part.astype(int) - np.array(colour)[:, None, None]).max() < 12
    on_white, _ = decode(data, whole)
    assert (on_white[:, :, half + edge :] == 255).all() and np.abs(
        on_white[1, :, : half - edge].astype(int) - 30
    ).max() < 12


def test_what_jpeg_cannot_hold_is_refused_with_a_reason(kit):
    with pytest.raises(SampleFault, match=r"transparency.*--encoding webp"):
        image_field(kit.encoded(half_transparent()), ImageOptions(encoding="jpeg"))
    opaque = Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 255))
    assert list(image_field(kit.encoded(opaque), ImageOptions(encoding="jpeg"))) == ["jpg"]


def test_shrinking_lets_no_hidden_colour_into_what_is_seen():
    image = Image.new("RGBA", (60, 60), (250, 250, 250, 255))
    image.paste((0, 0, 0, 0), (31, 0, 60, 60))
    pixels = np.array(shrunk(image, 20)).astype(int)
    assert pixels.shape == (20, 20, 4) and (pixels[pixels[:, :, 3] > 64][:, :3] > 240).all()
    assert (pixels[:, 15:] == 0).all() and shrunk(image, 60) is image


def test_a_mask_is_multiplied_by_the_pictures_own_alpha_and_its_colours_are_kept(kit):
    image, mask = half_transparent(), Image.new("L", (SIDE, SIDE), 255)
    mask.paste(0, (0, 0, SIDE, SIDE // 2))
    mask.paste(128, (0, 0, SIDE // 2, SIDE // 4))
    made = np.array(with_mask(image, kit.encoded(mask)))
    assert np.array_equal(made[:, :, :3], np.array(image)[:, :, :3])
    expected = np.array(mask).astype(int) * (np.array(image)[:, :, 3] > 0)
    assert np.array_equal(made[:, :, 3], expected)


def test_a_masked_picture_follows_the_quality_and_may_be_wider_than_a_webp(kit):
    noise = kit.encoded(half_transparent().convert("RGB"))
    mask = kit.encoded(Image.new("L", (2, 1), 255))
    sizes = [len(image_field(noise, ImageOptions(quality=quality), mask)["webp"]) for quality in (5, 95)]
    assert sizes[0] < sizes[1] / 2
    wide = kit.encoded(Image.new("RGB", (16_400, 2), (1, 2, 3)))
    pixels = np.array(Image.open(io.BytesIO(image_field(wide, ImageOptions(), mask)["png"])))
    assert pixels.shape == (2, 16_400, 4) and (pixels == (1, 2, 3, 255)).all()


def test_deep_grey_keeps_its_values_beside_the_one_that_is_transparent(kit):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    data = kit.encoded(Image.fromarray(values), transparency=(100 * 257))
    pixels, _ = decode_masked(data, whole)
    levels = np.arange(256).reshape(16, 16)
    assert all(np.array_equal(pixels[channel], levels) for channel in range(3))
    assert np.array_equal(pixels[3], np.where(levels == 100, 0, 255))


def test_a_bad_value_is_refused():
    with pytest.raises(UserError, match="white or mask"):
        ShardDataModule("nowhere", resolution=16, batch_size=1, alpha="black")
