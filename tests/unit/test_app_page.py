"""Who may open the page, what it plans, what stays in memory: all that needs no gradio."""

import asyncio
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from hdm_lightning.app.app_settings import AppSettings, credentials, require_auth
from hdm_lightning.app.own_origin import HEADERS, OwnOrigin
from hdm_lightning.app.plan_choices import PAPER, cards, experiments, plan
from hdm_lightning.app.side_by_side import number_from
from hdm_lightning.cli.hydra_app import short_name
from hdm_lightning.cli.plan_schedule import run_plan
from hdm_lightning.errors import UserError
from hdm_lightning.training.recorded import recorded_values


@pytest.mark.parametrize(
    ("host", "is_open"),
    [("127.0.0.1", False), ("127.8.8.8", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True)],
)
def test_only_loopback_needs_no_password(host, is_open):
    settings = AppSettings(host=host)
    assert settings.is_open == is_open
    if is_open:
        with pytest.raises(UserError, match="--host"):
            require_auth(settings)
    require_auth(AppSettings(host=host, auth="me"))


def test_a_password_is_given_or_asked_for():
    assert credentials(None, None) is None
    assert credentials("me:it:is", None) == ("me", "it:is")
    assert credentials("me", lambda _: "typed") == ("me", "typed")
    for wrong in (":x", "me:", ""):
        with pytest.raises(UserError, match="--auth"):
            credentials(wrong, lambda _: "typed")


def answer(app, headers):
    """Status and headers of the answer to a request with these headers."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [(key.encode(), value.encode()) for key, value in headers.items()]}
    asyncio.run(app(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


async def page(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "127.0.0.1:7860", "origin": "http://elsewhere.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:8000"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://[::1"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "rebound.example:7860", "origin": "http://rebound.example:7860"}, 403),
        ({}, 403),
    ],
)
def test_other_pages_are_refused(headers, status):
    got, answered = answer(OwnOrigin(page, hosts=("127.0.0.1", "localhost", "::1")), headers)
    assert got == status
    if status == 200:
        assert answered == {name.encode(): value.encode() for name, value in HEADERS.items()}


def test_a_page_open_to_others_may_have_any_name_and_still_no_foreign_origin():
    app = OwnOrigin(page)
    assert answer(app, {"host": "box.lan:7860", "origin": "http://box.lan:7860"})[0] == 200
    assert answer(app, {"host": "box.lan:7860", "origin": "http://elsewhere.example"})[0] == 403


def test_a_missing_extra_is_named():
    program = (
        "import sys; sys.modules['gradio'] = None\n"
        "from hdm_lightning.app.serve import main\n"
        "sys.exit(main(['--out', sys.argv[1]]))"
    )
    run = subprocess.run([sys.executable, "-c", program, "."], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "hdm-lightning[app]" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--runs", "/nowhere"],
        ["--models", "/nowhere"],
        ["--loras", "nowhere"],
        ["--host", "0.0.0.0"],
        ["--keep", "0"],
        ["--port", "70000"],
        ["--prot", "1"],
    ],
)
def test_mistakes_of_the_command_line_end_before_anything_is_loaded(words, capsys):
    from hdm_lightning.app.serve import main

    assert main(words) == 2
    assert words[0] in capsys.readouterr().err


def test_a_plan_is_what_the_command_says():
    found = plan("paper_small", "4090", 2, 100, {"dataset.images": 500_000, "gpu.usd_per_hour": None})
    overrides = ["experiment=paper_small", "gpus=2x4090", "budget_usd=100", "dataset.images=500000"]
    assert found.command == " ".join(["hdm-plan", *overrides])
    OmegaConf.register_new_resolver("hdm.short", short_name, replace=True)
    with initialize_config_module("hdm_lightning.conf", version_base="1.3"):
        content = run_plan(recorded_values(compose("plan", overrides=overrides))).content
    stages = content["stages"]
    assert [row[0] for row in found.rows] == [*(stage["stage"]["name"] for stage in stages), "all"]
    assert [row[1] for row in found.rows[:-1]] == [f"{stage['stage']['samples']:,}" for stage in stages]
    assert float(found.rows[-1][5]) == pytest.approx(sum(stage["rent_usd"] for stage in stages), abs=0.01)
    assert "$100 buys" in found.text


def test_large_numbers_reach_the_plan_as_they_are():
    found = plan(PAPER, "5090", 4, None, {"dataset.images": 8_469_001})
    assert found.command == "hdm-plan gpus=4x5090 dataset.images=8469001"


@pytest.mark.parametrize(
    ("choices", "where"),
    [
        (("../demo", "5090", 4, None), "experiment"),
        (("paper out=x", "5090", 4, None), "experiment"),
        ((PAPER, "5090,4090", 4, None), "card"),
        ((PAPER, "here", 4, None), "card"),
        ((PAPER, "5090", 0, None), "cards"),
        ((PAPER, "5090", 1.5, None), "cards"),
        ((PAPER, "5090", "4x", None), "cards"),
        ((PAPER, "5090", float("nan"), None), "cards"),
        ((PAPER, "5090", float("inf"), None), "cards"),
        ((PAPER, "5090", 4, -3), "budget"),
        ((PAPER, "5090", 4, 0.01), "budget_usd"),
    ],
)
def test_choices_that_are_none_are_refused(choices, where):
    with pytest.raises(UserError) as error:
        plan(*choices, {})
    assert error.value.where == where


def test_every_choice_of_the_page_is_one_of_the_command():
    assert (
        experiments()[0] == PAPER and "paper_cached" in experiments() and not any("." in each for each in experiments())
    )
    assert "4090" in cards() and "cpu" not in cards()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None, "3", True])
def test_what_is_no_finite_number_in_a_field_is_named(value, whole):
    with pytest.raises(UserError) as caught:
        number_from(value, "steps", whole=whole)
    assert caught.value.where == "steps"
