"""The committed set is what its note says it is."""

import io
import json
from pathlib import Path

from PIL import Image

from hdm_lightning.data.index import load_index
from hdm_lightning.datasets.openclipart_drawing import Miniatures
from hdm_lightning.datasets.openclipart_source import EXCLUDED
from shard_contents import members_in

FOLDER = Path(__file__).parents[3] / "data/openclipart-mini"


def test_size_and_index():
    index = load_index(str(FOLDER / "index.json"))
    assert index.samples == 1000 and len(list(FOLDER.glob("*.tar"))) == 4
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 7_000_000


def test_pictures_and_captions():
    samples = members_in(FOLDER)
    assert len(samples) == 1000
    aspects, seen = [], Miniatures()
    for key, sample in samples.items():
        picture, facts = Image.open(io.BytesIO(sample["webp"])), json.loads(sample["json"])
        assert max(picture.size) == 256 and picture.size == (facts["width"], facts["height"]), key
        assert sample["txt"].decode() == facts["captions"][0] and len(facts["captions"]) >= 2, key
        assert "&" not in facts["title"].replace("& ", "") and "_" not in sample["txt"].decode(), key
        assert facts["licence"] == "public domain"
        assert facts["source"].partition(": ")[2] not in EXCLUDED
        assert seen.add(sample["webp"]), key
        aspects.append(picture.width / picture.height)
    assert min(aspects) >= 1 / 4 and max(aspects) <= 4
    assert sum(a < 2 / 3 for a in aspects) > 100 and sum(a > 3 / 2 for a in aspects) > 100
