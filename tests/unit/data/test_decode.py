"""Decoding and resizing, against the plain way: decode all, resize all, cut."""

import io
import random
import subprocess
import sys
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from hdm_lightning.data import decode as decoding
from hdm_lightning.data.benchmark import measure_decoding, measure_loading, synthetic_photograph
from hdm_lightning.data.crops import Crop, CropRules
from hdm_lightning.data.decode import cut, decode, decode_jpeg, open_image, upright_size
from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.randomness import Draws

RULES = CropRules(max_aspect=1e9)


def chooser(resolution, key=0):
    return lambda height, width: RULES.choose(height, width, (resolution, resolution), Draws(key))


@lru_cache
def scenery():
    return synthetic_photograph(1344, 1500, 0)


def photograph(height, width):
    """A part of a picture with the statistics of photographs; thin strips come from its edge."""
    return scenery().resize((width, height)) if max(height, width) > 1344 else scenery().crop((0, 0, width, height))


def plain(data, crop):
    """What the pipeline must give: the whole image, resized with Pillow's bicubic filter, then cut."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = image.resize((crop.full_width, crop.full_height), Image.Resampling.BICUBIC)
    image = ImageOps.mirror(image) if crop.flip else image
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    return np.asarray(image.crop(box)).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize(
    ("height", "width", "resolution"),
    [(128, 128, 64), (100, 151, 64), (64, 64, 64), (64, 90, 64), (40, 30, 64), (1, 50, 8), (50, 1, 8), (31, 700, 16)],
)
def test_without_loss_the_result_is_the_plain_one_within_a_level(kit, height, width, resolution):
    data = kit.encoded(photograph(height, width))
    for key in range(3):
        pixels, crop = decode(data, chooser(resolution, key))
        assert pixels.shape == (3, resolution, resolution) and pixels.dtype == np.uint8
        difference = np.abs(pixels - plain(data, crop))
        assert difference.max() <= 1 and difference.mean() < 0.05


def test_a_crop_is_that_part_of_the_whole_resize():
    """Torch's kernel resizes the whole image; here only what the crop depends on is looked at."""
    random = np.random.default_rng(0)
    for _ in range(150):
        height, width = random.integers(20, 200, 2)
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        full_height, full_width = (max(8, int(side * random.uniform(0.3, 2.5))) for side in (height, width))
        shown = [int(random.integers(full // 2 + 1, full + 1)) for full in (full_height, full_width)]
        top, left = (
            int(random.integers(full - own + 1)) for full, own in zip((full_height, full_width), shown, strict=True)
        )
        crop = Crop(top, left, full_height, full_width, *shown, flip=bool(random.integers(2)))
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        size = [full_height, full_width]
        whole = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)[0].numpy().astype(int)
        whole = whole[:, :, ::-1] if crop.flip else whole
        want = whole[:, top : top + crop.height, left : left + crop.width]
        assert np.abs(cut(image, crop) - want).max() <= 1  # eight-bit weights may round another way


@pytest.mark.parametrize(
    ("height", "width", "resolution", "largest_mean"),
    [
        (1024, 1024, 256, 1.0),
        (832, 1216, 256, 1.0),
        (1001, 1003, 256, 1.0),
        (768, 1344, 256, 1.0),
        (1024, 1024, 512, 0.05),
        (640, 640, 64, 1.0),
        (300, 300, 256, 0.05),
    ],
)
def test_reduced_decoding_stays_within_a_grey_level(kit, height, width, resolution, largest_mean):
    data = kit.encoded(photograph(height, width), "JPEG", quality=88)
    pixels, crop = decode(data, chooser(resolution))
    assert np.abs(pixels - plain(data, crop)).mean() < largest_mean


def test_jpegs_are_decoded_at_a_reduced_scale_never_below_the_target(kit, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        decoding, "cut", lambda pixels, crop, seen: sizes.append(pixels.shape[1::-1]) or cut(pixels, crop, seen)
    )
    for height, width, resolution in [(1024, 1024, 256), (1024, 1024, 100), (1024, 900, 512), (1024, 512, 40)]:
        decode(kit.encoded(Image.new("RGB", (width, height)), "JPEG"), chooser(resolution))
    assert sizes == [(512, 512), (256, 256), (900, 1024), (128, 256)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_turned_images_are_put_upright(kit, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = kit.encoded(photograph(300, 400), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright_size(data) == upright.size[::-1]
    pixels, crop = decode(data, chooser(48, 3))
    assert np.abs(pixels - plain(data, crop)).mean() < 1.0
    assert (crop.full_height, crop.full_width) == ((64, 48) if orientation > 4 else (48, 64))


def test_flip_mirrors_the_full_image_before_the_cut(kit):
    data = kit.encoded(photograph(64, 96))
    for full in ((64, 96), (32, 48), (20, 160)):
        crop = Crop(3, 5, *full, 16, 16, flip=True)
        pixels, _ = decode(data, lambda height, width, crop=crop: crop)
        assert np.abs(pixels - plain(data, crop)).max() <= 1


def grey(kit, image, **options):
    return decode(kit.encoded(image, **options), chooser(8))[0]


def test_every_kind_of_pixel_becomes_rgb(kit):
    red = (200, 30, 60)
    cases = {
        "palette": Image.new("RGB", (8, 8), red).quantize(4),
        "rgb": Image.new("RGB", (8, 8), red),
        "opaque alpha": Image.new("RGBA", (8, 8), (*red, 255)),
    }
    for name, image in cases.items():
        assert np.abs(grey(kit, image)[:, 4, 4].astype(int) - red).max() <= 1, name
    for mode, colour, expected in [
        ("L", 77, 77),
        ("1", 1, 255),
        ("LA", (77, 255), 77),
        ("LA", (0, 0), 255),
        ("RGBA", (10, 20, 30, 0), 255),
        ("RGBA", (0, 0, 0, 128), 127),
        ("I;16", 300 * 257 // 2, 150),
        ("I;16", 65535, 255),
    ]:
        pixels = grey(kit, Image.new(mode, (8, 8), colour))
        assert pixels.shape == (3, 8, 8)
        assert np.abs(pixels.astype(int) - expected).max() <= 1, (mode, colour)


def test_transparent_palettes_and_colour_keys_lie_on_white(kit):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert grey(kit, image, transparency=0).min() == 255
    assert grey(kit, Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)).min() == 255


@pytest.mark.parametrize(("see_through", "left", "right"), [(40 * 257, 255, 200), (7, 40, 200)])
def test_one_level_of_deep_grey_may_be_see_through(kit, see_through, left, right):
    deep = np.full((8, 8), 200 * 257, np.uint16)
    deep[:, :4] = 40 * 257
    pixels = grey(kit, Image.fromarray(deep), transparency=see_through)
    assert (pixels[:, :, 0] == left).all() and (pixels[:, :, 7] == right).all()


def test_the_first_picture_of_a_phone_is_decoded_at_a_reduced_scale(kit, monkeypatch):
    """Multi-picture JPEGs: a photograph with a small one of something else behind it."""
    photo, options = photograph(600, 800), {"quality": 88}
    single = kit.encoded(photo, "JPEG", **options)
    double = kit.encoded(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (300, 300))], **options)
    assert Image.open(io.BytesIO(double)).format == "MPO"
    scales, decoder = [], decoding.decode_jpeg
    monkeypatch.setattr(
        decoding, "decode_jpeg", lambda data, header, scale: scales.append(scale) or decoder(data, header, scale)
    )
    (one, _), (two, crop) = (decode(data, chooser(64)) for data in (single, double))
    assert scales == [4, 4] and np.array_equal(one, two)
    monkeypatch.setattr(decoding, "decode_jpeg", lambda data, header, scale: None)
    assert np.abs(decode(double, chooser(64))[0] - plain(double, crop)).mean() < 1.0


def test_cmyk_jpegs_have_the_right_colours(kit):
    image = Image.new("RGB", (64, 64), (200, 40, 90))
    pixels, _ = decode(kit.encoded(image.convert("CMYK"), "JPEG", quality=95), chooser(8))
    assert np.abs(pixels.mean((1, 2)) - (200, 40, 90)).max() < 4


def test_the_first_frame_of_an_animation_counts(kit):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "WEBP", "PNG"):
        data = kit.encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        pixels, _ = decode(data, chooser(8))
        assert pixels[:, 4, 4].tolist()[0] > 240 and pixels[1].max() < 20, kind


@pytest.mark.parametrize("keep", [0, 1, 20, 200, -200, -2])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_cut_images_are_faults_and_never_anything_else(kit, kind, keep):
    data = kit.encoded(photograph(64, 64), kind)[:keep]
    try:
        pixels, _ = decode(data, chooser(32))
        assert pixels.shape == (3, 32, 32)  # a few formats lose only their end mark
        assert keep == -2
    except SampleFault as fault:
        assert "image" in str(fault)


def broken(data, rng):
    """A picture with one to three places damaged, more often than not in its first bytes."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(data) if rng.random() < 0.4 else min(len(data), 80))
        end = start + rng.choice([1, 2, 8, 50])
        way = rng.randrange(4)
        data[start:end] = (b"", rng.randbytes(end - start), bytes(end - start), rng.randbytes(3) + data[start:end])[way]
        data = data or bytearray(b"x")
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("MPO", "RGB", {"save_all": True}),
        ("PNG", "P", {"transparency": 1}),
        ("WEBP", "RGB", {}),
        ("GIF", "P", {"save_all": True}),
        ("BMP", "RGB", {}),
    ],
)
def test_damaged_pictures_are_used_or_faults_and_never_anything_else(kit, kind, mode, options):
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"append_images": [photograph(40, 40).convert(mode)]} if "save_all" in options else {}
    whole = kit.encoded(
        photograph(48, 64).convert(mode), kind, **options, **more, **({"exif": exif} if not more else {})
    )
    faults = 0
    for seed in range(200):
        data = broken(whole, random.Random(seed))
        try:
            height, width = upright_size(data)
            pixels, crop = decode(data, chooser(16, seed))
            assert pixels.shape == (3, 16, 16)
            assert min(crop.full_height, crop.full_width) == 16 and (height > width) == (crop.full_height > 16)
        except SampleFault:
            faults += 1
    assert 20 < faults < 200


def test_bombs_and_strangers_are_faults(kit, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    with pytest.raises(SampleFault, match="too many pixels"):
        decode(kit.encoded(Image.new("RGB", (100, 11))), chooser(8))
    monkeypatch.undo()
    header = bytearray(kit.encoded(Image.new("L", (9, 9)), "BMP"))
    header[18:26] = (60000).to_bytes(4, "little") * 2
    with pytest.raises(SampleFault, match="too many pixels: 3600000000"):
        decode(bytes(header), chooser(8))
    for data in (b"", b"<svg></svg>", b"PK\x03\x04", b"\x00" * 100):
        with pytest.raises(SampleFault, match="image"):
            decode(data, chooser(8))
        with pytest.raises(SampleFault, match="image"):
            upright_size(data)


def test_a_strip_of_one_pixel_is_cut_without_making_its_full_size(kit):
    data = kit.encoded(photograph(1, 5000))
    pixels, crop = decode(data, chooser(256))
    assert crop.full_width == 1_280_000 and pixels.shape == (3, 256, 256)
    with pytest.raises(SampleFault, match="too long"):
        CropRules().choose(1, 5000, (256, 256), Draws(0))


def test_profiles_and_broken_exif_do_not_disturb(kit):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (8, 8), (9, 8, 7))
    for options in ({"icc_profile": profile}, {"exif": b"Exif\0\0broken"}):
        pixels, _ = decode(kit.encoded(image, "PNG", **options), chooser(8))
        assert pixels[:, 0, 0].tolist() == [9, 8, 7]


def test_the_benchmark_measures_what_it_says(kit, shards):
    """Figures of a busy machine prove little; that ours is faster than the plain way must hold on any."""
    files = [kit.encoded(photograph(1024, 1216), "JPEG", quality=88)]
    speed = measure_decoding(256, images=files, repeats=3)
    assert speed.over_plain > 1.5 and 0.2 < speed.of_bound < 1.2
    assert speed.mean_difference < 1.0 and speed.bytes_per_image == len(files[0])
    loading = measure_loading(kit.stream_config(shards), kit.letters, batch_size=10, batches=5)
    assert loading.samples_per_s > 50 and loading.workers == 0


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}])
@pytest.mark.parametrize("size", [(64, 64), (63, 50), (17, 130), (1, 9), (333, 250)])
def test_both_decoders_give_the_same_pixels_at_every_scale(kit, size, options):
    data = kit.encoded(photograph(*size), "JPEG", quality=80, **options)
    for scale in (1, 2, 4, 8):
        if min(size) < scale:
            continue
        drafted = Image.open(io.BytesIO(data))
        drafted.draft("RGB", (drafted.width // scale, drafted.height // scale))
        assert np.array_equal(decode_jpeg(data, open_image(data), scale), np.asarray(drafted))


def test_jpegs_that_are_not_plain_colour_or_not_intact_are_left_to_pillow(kit):
    intact = kit.encoded(photograph(64, 64), "JPEG")
    grey, inks = (kit.encoded(photograph(64, 64).convert(mode), "JPEG") for mode in ("L", "CMYK"))
    for data in (grey, inks, intact[:-200]):
        assert decode_jpeg(data, open_image(data), 1) is None
    assert decode_jpeg(intact, open_image(intact), 1) is not None
    stray = intact[:-2] + b"\0\0\0\0" + intact[-2:]  # bytes before the end mark: a warning of the decoder, no harm
    pixels, _ = decode(stray, chooser(64))
    assert np.array_equal(pixels, decode(intact, chooser(64))[0])
    with pytest.raises(SampleFault, match="truncated"):
        decode(intact[:-200], chooser(64))


@pytest.mark.parametrize(
    ("category", "module", "seen"),
    [
        ("DeprecationWarning", "PIL.Image", True),
        ("UserWarning", "mine", True),
        ("Image.DecompressionBombWarning", "mine", True),
        ("UserWarning", "PIL.TiffImagePlugin", False),
        ("Image.DecompressionBombWarning", "PIL.Image", False),
    ],
)
def test_only_what_pillow_says_of_bad_images_is_silenced(category, module, seen):
    """In a program of its own, as the runner of the tests has filters of its own."""
    lines = (
        "import warnings, hdm_lightning.data.decode",
        "from PIL import Image",
        f"warnings.warn_explicit('heard', {category}, 'file.py', 1, module={module!r})",
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", "\n".join(lines)], check=True, capture_output=True, text=True
    )
    assert ("heard" in done.stderr) == seen
