"""The page in a real browser: draw, look, mark, plan; what it shows, against the commands that do the same."""

import io
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hdm_lightning.app.side_by_side import LAST_WEIGHTS
from hdm_lightning.data.index import load_index
from hdm_lightning.generation.image_files import read_record

HACK = "<img src=x onerror='hacked=1'>"
SLOW_MS = 60_000


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def field(page, name):
    return page.locator(f"#{name} textarea, #{name} input").first


def choose(page, name, option):
    field(page, name).blur()
    field(page, name).fill(option)
    page.get_by_role("option", name=option, exact=True).click()
    field(page, name).blur()


def draw(page, prompt, count="1"):
    field(page, "prompt").fill(prompt)
    field(page, "images").fill(count)
    page.locator("#draw").click()


def images(page, name, count):
    """The pictures of a gallery, once there are so many of them."""
    page.wait_for_function(
        "([name, count]) => document.querySelectorAll(`#${name} img`).length == count",
        arg=[name, count],
        timeout=SLOW_MS,
    )
    return page.locator(f"#{name} img")


def fetched(page, source):
    """The bytes of a picture as the browser has them."""
    return bytes(
        page.evaluate("async url => Array.from(new Uint8Array(await (await fetch(url)).arrayBuffer()))", source)
    )


def pixels(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


def sample(served, *words):
    """Run hdm-sample where the page runs; the new pictures."""
    command = [sys.executable, "-m", "hdm_lightning.cli.sample", *words, "--device", "cpu", "--out", "theirs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=served.folder, env=environment, capture_output=True, text=True, check=True)
    return [served.folder / line for line in run.stdout.split() if "sheet" not in line]


def test_what_is_drawn_is_what_hdm_sample_draws(page, served):
    choose_only(page, "runs/two")
    page.wait_for_function("document.querySelector('#steps input').value == '4'", timeout=SLOW_MS)  # its own settings
    field(page, "steps").fill("5")
    page.get_by_role("button", name="Camera").click()
    field(page, "x_shift").fill("0.25")
    field(page, "zoom").fill("1.2")
    draw(page, "a red circle", count="2")
    sources = [image.get_attribute("src") for image in images(page, "drawn", 2).all()]
    ours = [fetched(page, source) for source in sources]
    options = ["--steps", "5", "--x-shift", "0.25", "--zoom", "1.2", "--count", "2", "--no-sheet"]
    theirs = sample(served, "runs/two", "a red circle", *options)
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(pixels(one), pixels(other.read_bytes()))
    # The file that can be downloaded is the one that was written, with its record.
    with page.expect_download() as download:
        page.locator("#files a").first.click()
    saved = served.folder / "saved.png"
    download.value.save_as(saved)
    assert saved.read_bytes() == ours[0] and read_record(saved) == read_record(theirs[0])
    commands = field(page, "commands").input_value().splitlines()
    words = commands[1].split()
    assert words[:2] == ["hdm-sample", "--repeat"]
    (again,) = sample(served, *words[1:])
    assert np.abs(pixels(again.read_bytes()).astype(int) - pixels(ours[1])).max() <= 1  # alone, not in a batch


def choose_only(page, *models):
    for cross in page.locator("#models .token-remove:not(.remove-all)").all():
        cross.click()
    for model in models:
        choose(page, "models", model)


def test_models_and_averages_stand_side_by_side(page):
    choose_only(page, "runs/one", "runs/two", "runs/two" + LAST_WEIGHTS)
    draw(page, "a star", count="2")
    shown = images(page, "drawn", 6)
    captions = page.locator("#drawn .caption-label").all_inner_texts()
    models = ["runs/one", "runs/two", "runs/two" + LAST_WEIGHTS]
    assert captions == [f"seed {seed} · {model}" for seed in (0, 1) for model in models]
    boxes = [image.bounding_box() for image in shown.all()]
    assert len({round(box["y"]) for box in boxes}) == 2 and len({round(box["x"]) for box in boxes}) == 3
    assert len({fetched(page, image.get_attribute("src")) for image in shown.all()}) == 6


def test_a_dropped_picture_brings_its_settings(page, served):
    camera = ["--steps", "3", "--zoom", "1.3", "--negative-prompt", "dark", "--guidance-interval", "0.1", "0.8"]
    seed = str(2**62 + 1)  # beyond what a browser's numbers hold
    (picture,) = sample(served, "runs/one", "a green square", "--seed", seed, "--size", "48x32", *camera)
    content = list(picture.read_bytes())
    transfer = page.evaluate_handle(
        "content => { const data = new DataTransfer(); data.items.add(new File([new Uint8Array(content)], 'a.png',"
        " {type: 'image/png'})); return data; }",
        content,
    )
    page.locator("#dropped button").first.dispatch_event("drop", {"dataTransfer": transfer})
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a green square'", timeout=SLOW_MS)
    assert "all of its settings" in field(page, "notes").input_value()
    for title in ("Camera", "Routing and guidance"):
        page.get_by_role("button", name=title).click()
    shown = {
        name: field(page, name).input_value() for name in ("seed", "width", "height", "zoom", "low", "high", "negative")
    }
    assert shown == {
        "seed": seed,
        "width": "48",
        "height": "32",
        "zoom": "1.3",
        "low": "0.1",
        "high": "0.8",
        "negative": "dark",
    }
    page.locator("#draw").click()
    source = images(page, "drawn", 1).first.get_attribute("src")
    assert np.array_equal(pixels(fetched(page, source)), pixels(picture.read_bytes()))


def test_mistakes_are_messages(page):
    field(page, "width").fill("33")
    draw(page, "a star")
    toast = page.locator(".toast-body")
    toast.wait_for(timeout=SLOW_MS)
    assert "both sides of 33x32 must be multiples of" in toast.inner_text() and "Traceback" not in toast.inner_text()


def test_stop_ends_what_draws_and_what_waits(page, served, browser):
    other = browser.new_page(viewport={"width": 1400, "height": 1000})
    other.goto(served.address)
    other.wait_for_function("document.querySelector('#steps input')?.value == '3'", timeout=SLOW_MS)
    field(page, "steps").fill("900")
    draw(page, "a star", count="4")
    page.get_by_text("generating").first.wait_for(timeout=SLOW_MS)
    before = set(served.folder.rglob("*.png"))
    draw(other, "a circle")  # behind the other page's
    other.locator("#drawn").get_by_text("queue").first.wait_for(timeout=SLOW_MS)
    for each in (other, page):
        each.locator("#stop").click()
    for each in (other, page):
        each.locator(".toast-body").get_by_text("stopped").wait_for(timeout=SLOW_MS)
    assert set(served.folder.rglob("*.png")) == before
    other.locator(".toast-close").first.click()
    other.locator("#draw").click()  # a stop does not outlast what it ended
    images(other, "drawn", 1)
    other.close()


def test_a_run_shows_its_stages_curves_samples_and_ledger(page):
    tab(page, "Runs")
    choose(page, "run", "runs/one")
    images(page, "samples", 2)
    assert (
        "112 s spent, $1.50" in field(page, "left").input_value() or "2 min spent" in field(page, "left").input_value()
    )
    text = page.locator("#stages").inner_text()
    assert "px16" in text and "px32" in text and "raw 0.5000" in text
    page.locator("#plot canvas, #plot svg").first.wait_for(timeout=SLOW_MS)
    assert "train/loss_mean" in page.locator("#curves").inner_text()
    page.get_by_role("button", name="Ledger").click()
    page.locator("#ledger").get_by_text("progress").filter(visible=True).first.wait_for(timeout=SLOW_MS)


def test_the_newest_run_is_shown_until_another_is_chosen(page):
    tab(page, "Runs")
    images(page, "samples", 2)
    assert field(page, "run").input_value() == f"runs/{HACK}"  # written last
    choose(page, "run", "runs/one")
    page.wait_for_function("document.querySelector('#stages').innerText.includes('raw 0.5000')", timeout=SLOW_MS)
    page.locator("#read-run").click()
    tab(page, "Plan")
    tab(page, "Runs")
    page.wait_for_timeout(1500)
    assert field(page, "run").input_value() == "runs/one"


def test_no_tab_is_wider_than_a_small_window(page):
    page.set_viewport_size({"width": 420, "height": 900})
    for name in ("Generate", "Shards", "Plan", "Runs"):
        tab(page, name)
        page.get_by_role("tabpanel").filter(visible=True).first.wait_for(timeout=SLOW_MS)
        if name == "Runs":
            images(page, "samples", 2)
            page.get_by_role("button", name="Ledger").click()
            page.locator("#ledger").get_by_text("progress").filter(visible=True).first.wait_for(timeout=SLOW_MS)
        assert page.evaluate("document.documentElement.scrollWidth") <= 420, name


def test_a_sample_is_found_shown_and_left_out(page, served):
    tab(page, "Shards")
    field(page, "words").fill("00021")
    page.locator("#search").click()
    images(page, "hits", 1)
    page.locator("#hits .thumbnail-item").click()
    page.locator("#whole img").wait_for(timeout=SLOW_MS)
    assert field(page, "sample-text").input_value().startswith("shard-00001.tar/00021 (sample 5)\n")
    field(page, "resolution").fill("32")
    page.locator("#crops").click()
    page.locator("#seen img").wait_for(timeout=SLOW_MS)
    page.locator("#mark").click()
    page.locator(".toast-body").get_by_text("reason").wait_for(timeout=SLOW_MS)  # none was given
    assert load_index(served.folder / "shards").samples == 40
    field(page, "reason").fill(HACK)
    page.locator("#mark").click()
    page.wait_for_function(
        "document.querySelector('#found textarea, #found input').value.includes('39 samples remain')", timeout=SLOW_MS
    )
    (record,) = [each for each in load_index(served.folder / "shards").shards if each.skip]
    assert (record.name, dict(record.skip)) == ("shard-00001.tar", {5: f"marked by hand: {HACK}"})
    page.get_by_role("button", name="Left out of this set").click()
    page.locator("#marks").get_by_text(HACK).filter(visible=True).first.wait_for(timeout=SLOW_MS)
    field(page, "unmark-shard").fill("shard-00001.tar")
    field(page, "unmark-sample").fill("5")
    page.locator("#unmark").click()
    page.wait_for_function(
        "document.querySelector('#found textarea, #found input').value.includes('mark undone, 40')", timeout=SLOW_MS
    )


def test_a_plan_is_that_of_the_command(page, served):
    tab(page, "Plan")
    choose(page, "experiment", "paper_small")
    choose(page, "card", "4090")
    field(page, "cards").fill("2")
    field(page, "budget").fill("100")
    page.locator("#plan").click()
    page.locator("#plan-text pre").wait_for(timeout=SLOW_MS)
    command = field(page, "plan-command").input_value()
    assert command == "hdm-plan experiment=paper_small gpus=2x4090 budget_usd=100"
    run = [sys.executable, "-c", "from hdm_lightning.cli.plan import main; main()", *command.split()[1:]]
    printed = subprocess.run(run, cwd=served.folder, capture_output=True, text=True, check=True).stdout
    squeezed = [re.sub(r"\s+", " ", text).strip() for text in (page.locator("#plan-text pre").inner_text(), printed)]
    assert squeezed[0] == squeezed[1]


@pytest.mark.parametrize("words", ["plain", "other", "star"])
def test_captions_and_keys_of_others_are_text(page, words):
    tab(page, "Shards")
    choose(page, "set", "hostile")
    field(page, "words").fill(words)
    page.locator("#search").click()
    images(page, "hits", 1)
    page.locator("#hits .thumbnail-item").click()
    page.locator("#whole img").wait_for(timeout=SLOW_MS)
    field(page, "resolution").fill("32")
    page.locator("#crops").click()
    page.locator("#seen img").wait_for(timeout=SLOW_MS)
    assert "hacked=1" in field(page, "sample-text").input_value()


def test_names_and_tags_of_a_run_of_others_are_text(page):
    tab(page, "Runs")
    choose(page, "run", f"runs/{HACK}")
    images(page, "samples", 2)
    field(page, "curves").click()
    page.get_by_role("option", name=HACK, exact=True).click()
    page.wait_for_timeout(1500)  # the plot is drawn anew
    assert HACK in page.locator("#curves").inner_text()


def test_a_message_with_html_is_text(page):
    tab(page, "Runs")
    field(page, "run").fill(HACK)
    page.keyboard.press("Tab")
    toast = page.locator(".toast-body")
    toast.wait_for(timeout=SLOW_MS)
    assert HACK[:20] in toast.inner_text()


def test_a_hostile_picture_is_text(page, served):
    from dataclasses import replace

    import torch

    from hdm_lightning.generation.image_files import write_png

    (picture,) = sample(served, "runs/one", "a star", "--steps", "1")
    record = replace(read_record(picture), prompt=HACK, model=f"/x/{HACK}")
    write_png(served.folder / "hostile.png", torch.zeros(3, 8, 8, dtype=torch.uint8), record)
    page.locator("#dropped input[type=file]").set_input_files(served.folder / "hostile.png")
    page.wait_for_function(
        "document.querySelector('#notes textarea')?.value.includes('not a model of this page')", timeout=SLOW_MS
    )
    assert field(page, "prompt").input_value() == HACK
    draw(page, HACK)
    images(page, "drawn", 1)
