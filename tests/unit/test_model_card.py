"""The card of a model: what it says of data, measures and license, and that no text of theirs breaks out of it."""

import json

import pytest
import yaml

from hdm_lightning.evaluation.findings import Evaluation, Found, Measure
from hdm_lightning.evaluation.report import headline
from hdm_lightning.interop.model_card import card_license, model_card
from hdm_lightning.interop.pipeline_folder import record_measures, write_pipeline_folder
from hdm_lightning.metrics.bootstrap import Estimate
from hdm_lightning.models import XUT
from hdm_lightning.training.model_record import public_name
from toy_run import CONFIG


@pytest.fixture
def folder(tmp_path):
    training = {"name": "mine", "resolution": 64, "license": "mit", "stages": [{"validation": {"raw": 0.5}}]}
    weights = {"ema": XUT(CONFIG).state_dict()}
    write_pipeline_folder(tmp_path, weights, xut=CONFIG, text_encoder=None, write_vae=None, training=training)
    return tmp_path


def test_measures_of_an_evaluation_stand_on_the_card_and_in_the_index(folder):
    found = [Measure("clip", Estimate(0.25, 0.2, 0.3, 100)), Measure("other", Estimate(1.0, 1.0, 1.0, 1))]
    evaluation = Evaluation({}, {"primary": ["text.clip"]}, {"ema": {"text": Found(found)}})
    figures = headline(evaluation, "ema")
    assert figures == {"text.clip": {"value": 0.25, "low": 0.2, "high": 0.3}} and headline(evaluation, "raw") == {}
    record_measures(folder, figures)
    card = (folder / "README.md").read_text()
    assert (
        "| text.clip | 0.25 | 0.2 to 0.3 |".replace("_", "\\_") in card and "| validation loss, raw | 0.5 | |" in card
    )
    assert json.loads((folder / "model_index.json").read_text())["training"]["measures"] == figures
    record_measures(folder, {"text.clip": {"value": 0.5}})
    assert "0.25" not in (folder / "README.md").read_text()


def test_texts_of_data_stay_texts():
    evil = "a|b `c` <script>\n# heading [x](y) ```\n"
    training = {"name": evil, "data": [{"source": evil}], "captions": {evil: evil}, "prompts": [evil], "commit": evil}
    training |= {"measures": {evil: {"value": evil}}, "license": "mit\nname: x"}
    card = model_card(CONFIG.to_json(), {"name": evil, "layer": -1, "context_length": 8}, training, sampled=True)
    lines = card.splitlines()
    assert "<script>" not in card.split("```json")[0] and "\n# heading" not in card
    assert [line for line in lines if line.startswith("license")] == [] and "Not stated" in card
    assert sum(line.startswith("```") for line in lines) == 6  # three fences, as of any other model
    inside = card.split("```json\n")[1].split("\n```")[0]
    assert json.loads(inside)["commit"] == evil


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/me/sets/shapes", "shapes"),
        ("sets/shapes/", "shapes"),
        ("https://me:secret@host.example/a/b.tar?token=x", "https://host.example/a/b.tar"),
        ("s3://bucket/set", "s3://bucket/set"),
        ("file:///home/me/sets/shapes", "shapes"),
        ("file://localhost/home/me/sets/shapes", "shapes"),
        ("simplecache::https://me:secret@host.example/b.tar?token=x", "b.tar"),
        ("pipe:curl -s https://me:secret@host.example/b.tar?token=x", "a command"),
        ("pipe:ssh me@host cat /home/me/a.tar -i secret", "a command"),
        ("..", "a folder"),
    ],
)
def test_sources_are_named_without_what_is_private(given, shown):
    assert public_name(given) == shown


@pytest.mark.parametrize(
    ("own", "of_base", "stated"),
    [
        (None, "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("mit", "cc-by-nc-4.0", "mit"),
        ("mit", None, "mit"),
        (None, "my own", None),
        (None, None, None),
        ("other: flux-1-dev", None, "other: flux-1-dev"),
        (None, "other: flux-1-dev", "other: flux-1-dev"),
        ("mit", "other: flux-1-dev", "mit"),
    ],
)
def test_the_license_of_a_base_is_said_and_is_the_model_s_where_no_other_is_given(tmp_path, own, of_base, stated):
    training = {"license": own, "base": {"name": "them/net", "license": of_base, "hub": True}}
    (tmp_path / "README.md").write_text(model_card(CONFIG.to_json(), None, training))
    assert card_license(tmp_path / "README.md") == stated
    card = (tmp_path / "README.md").read_text()
    assert "\nbase_model: them/net\n" in card and "started from the weights of them/net" in card
    assert (of_base or "is unknown").removeprefix("other: ") in card.split("## License")[1]


def test_a_license_that_the_hub_has_no_identifier_for_stays_one_of_a_name(tmp_path):
    """It refuses a card whose `license` it does not know."""
    (tmp_path / "base.md").write_text("\ufeff---\nlicense: other\nlicense_name: flux-1-dev\n---\n", encoding="utf-8")
    license = card_license(tmp_path / "base.md")
    card = model_card(CONFIG.to_json(), None, {"base": {"name": "them/net", "license": license, "hub": True}})
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["license_name"]) == ("other", "flux-1-dev")
    assert "flux-1-dev, like the model" in card and "other:" not in card.split("---", 2)[2]


def test_a_folder_or_what_is_no_name_is_no_base_model(tmp_path):
    for base in (
        {"name": "runs/mine", "hub": False},
        {"name": "a/b\nlicense: mit", "hub": True},
        {"name": 3, "hub": True},
    ):
        (tmp_path / "README.md").write_text(model_card(CONFIG.to_json(), None, {"base": base}))
        front = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
        assert "base_model" not in front and "license" not in front
