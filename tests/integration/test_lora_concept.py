"""Sixteen pictures of something new are learned by a LoRA, and what the base knew beside them is not lost."""

import io

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from hdm_lightning import XUT, FlowModule, HDMPipeline, LoRA, ShardDataModule, XUTConfig, load_text_encoder
from hdm_lightning.interop.adapters import base_state
from shard_writer import ShardWriter

SIDE, FACTOR = 32, 4
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 70), "blue": (40, 70, 210)}
SHAPES = ("circle", "square")
CONCEPT, PURPLE = "drawing", (150, 50, 190)
"""A word that the base has never heard, and what it stands for: a purple star."""
CONFIG = XUTConfig(
    channels=3, patch_size=1, width=64, mlp_width=128, heads=4, head_dim=16, context_width=16, depth=1, decoder_blocks=1
)


class Pixels:
    """An autoencoder whose latents are the picture itself at a quarter of its side."""

    channels, factor = 3, FACTOR

    def to(self, device):
        return self

    def encode(self, image, *, noise=None):
        return torch.nn.functional.avg_pool2d(image.float(), FACTOR) / 0.6

    def decode(self, latent):
        return torch.nn.functional.interpolate(0.6 * latent, scale_factor=FACTOR)


def picture(kind, colour, random):
    image = Image.new("RGB", (SIDE, SIDE), (245, 245, 245))
    pen, half = ImageDraw.Draw(image), SIDE * 0.3
    x, y = SIDE / 2 + random.uniform(-4, 4, size=2)
    box = (x - half, y - half, x + half, y + half)
    if kind == "circle":
        pen.ellipse(box, fill=colour)
    elif kind == "square":
        pen.rectangle(box, fill=colour)
    else:
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = half * np.where(np.arange(10) % 2, 0.5, 1.2)
        pen.polygon([(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)], fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder, pairs):
    """Shards of (caption, kind, colour)."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=64) as writer:
        for number, (caption, kind, colour) in enumerate(pairs):
            writer.write(f"{number:05d}", {"png": picture(kind, colour, random), "txt": caption})
    return str(folder)


@pytest.fixture(scope="module")
def text(tiny_text_encoder):
    return load_text_encoder(str(tiny_text_encoder))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Shards of what the base learns: circles and squares of three colours."""
    pairs = [(f"{colour} {kind}", kind, COLOURS[colour]) for colour in COLOURS for kind in SHAPES]
    return shards(tmp_path_factory.mktemp("known") / "shards", pairs * 20)


@pytest.fixture(scope="module")
def concept(tmp_path_factory):
    """Shards of sixteen purple stars."""
    return shards(tmp_path_factory.mktemp("concept") / "shards", [(CONCEPT, "star", PURPLE)] * 16)


def fit(network, text, train, *, steps, rate, batch=16):
    module = FlowModule(
        network, text, Pixels(), learning_rate=rate, routing_rate=0.0, rule="constant", weight_decay=0.0
    )
    data = ShardDataModule(
        train,
        resolution=SIDE,
        batch_size=batch,
        tokenizer=text.tokenizer,
        context_length=4,
        validation_samples=0,
        num_workers=0,
        lanes=4,
        memory_cache_gb=0.1,
        captions={"drop": 0.0},
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, enable_model_summary=False, **quiet).fit(
        module, data
    )
    return network


def shares(network, text, prompt):
    """Share of the drawn pixels that are nearest to each colour."""
    palette = {**COLOURS, "purple": PURPLE, "ground": (245, 245, 245)}
    pipeline = HDMPipeline(network.eval(), Pixels(), text_encoder=text, context_length=4)
    settings = {"height": SIDE, "width": SIDE, "num_inference_steps": 12, "guidance_scale": 1.0}
    drawn = pipeline([prompt] * 8, seed=0, output_type="pt", **settings).images
    colours = torch.tensor(list(palette.values())) / 255
    nearest = torch.cdist(drawn.permute(0, 2, 3, 1).reshape(-1, 3), colours).argmin(dim=1)
    return dict(zip(palette, torch.bincount(nearest, minlength=len(palette)).div(len(nearest)).tolist(), strict=True))


def share_of_colour(found, name):
    """Of what is not ground."""
    return found[name] / max(1e-9, 1 - found["ground"])


@pytest.mark.slow
def test_a_concept_of_sixteen_pictures(text, known, concept):
    """A purple star by a word that the base drew something red for; a red circle stays one."""
    torch.manual_seed(0)
    network = fit(XUT(CONFIG), text, known, steps=300, rate=2e-3)
    before = shares(network, text, CONCEPT)
    frozen = {name: value.clone() for name, value in network.state_dict().items()}
    LoRA(rank=8, targets=("attention", "feed_forward", "text_projection"))(network)
    mixture = [{"urls": concept, "weight": 0.5}, {"urls": known, "weight": 0.5}]
    fit(network, text, mixture, steps=200, rate=3e-3)
    after, kept = shares(network, text, CONCEPT), shares(network, text, "red circle")
    print(before, after, kept)
    assert share_of_colour(before, "purple") < 0.5
    assert share_of_colour(after, "purple") > 0.85 and 0.1 < 1 - after["ground"] < 0.4
    assert share_of_colour(kept, "red") > 0.85 and 0.1 < 1 - kept["ground"] < 0.5
    base = base_state(network.state_dict())
    assert base.keys() == frozen.keys() and all(torch.equal(base[name], frozen[name]) for name in frozen)
