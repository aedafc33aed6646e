"""hdm-evaluate end to end on a tiny trained-model folder, a tiny run, and a tiny autoencoder."""

import hashlib
import io
import json
import math
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from hdm_lightning.cli import convert, evaluate
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.context import Measuring
from hdm_lightning.evaluation.evaluate_model import measuring
from hdm_lightning.evaluation.image_sets import real_images
from hdm_lightning.evaluation.request import PARTS
from hdm_lightning.models import PUBLISHED
from shard_writer import ShardWriter
from toy_run import CONFIG, shaken_state, write_final

SMALL = ["--samples", "12", "--loss-samples", "10", "--time-bins", "4", "--resamples", "50", "--set-resamples", "10"]
WORDS = ("red", "green", "blue", "small", "large", "star", "dark", "light")
FEW = ["--aspect-prompts", "3", "--camera-prompts", "3", "--diversity-prompts", "3", "--diversity-seeds", "2"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_text_encoder, tiny_autoencoder):
    folder = tmp_path_factory.mktemp("run")
    kept = {"training": {"samples": 4096, "name": "tiny"}, "raw": True}
    kept["sampling"] = {"height": 32, "width": 32, "steps": 2, "guidance_scale": 1.0}
    write_final(folder / "final", tiny_text_encoder, tiny_autoencoder, shaken_state(), **kept)
    return folder


@pytest.fixture(scope="module")
def evaluated(run_folder, tiny_shards, tmp_path_factory):
    """Folder of an evaluation of all parts that the tiny data allow."""
    out = tmp_path_factory.mktemp("evaluation")
    arguments = [str(run_folder), "--data", str(tiny_shards), "--train-data", str(tiny_shards), "--out", str(out)]
    assert evaluate.main([*arguments, *SMALL, *FEW]) == 0
    return out


def result_of(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_every_number_has_an_interval_a_count_and_a_method(evaluated):
    result = result_of(evaluated)
    assert set(result["results"]) == {"ema", "raw"}
    for parts in result["results"].values():
        assert set(parts) == {"loss", "kernel", "neighbours", "diversity", "aspect", "camera", "copies"}
        for part in parts.values():
            assert part["measures"]
            for name, measure in part["measures"].items():
                assert measure["low"] <= measure["value"] <= measure["high"], name
                assert measure["samples"] >= 2
                if "bootstrap" in measure["method"]:
                    assert 2 <= measure["resamples"] <= 50
                else:
                    assert measure["method"] == "Wilson score"
                assert measure["about"]


def test_what_a_measure_is_the_mean_of_is_kept_image_by_image(evaluated):
    for parts in result_of(evaluated)["results"].values():
        for key in ("loss", "kernel", "camera", "copies"):
            assert parts[key]["outcomes"]
            for name, images in parts[key]["outcomes"].items():
                measure = parts[key]["measures"][name]
                assert len(images["values"]) == measure["samples"]
                assert sum(images["values"]) / len(images["values"]) == pytest.approx(measure["value"], rel=1e-4), name


def test_the_camera_stands_beside_what_unrelated_images_give(evaluated):
    for parts in result_of(evaluated)["results"].values():
        chances = {name: measure["chance"] for name, measure in parts["camera"]["measures"].items()}
        assert len(chances) == 9
        assert all(-1.0 <= chances[name] <= 3.0 for name in chances if name == "zoom_response")
        assert all(0.0 <= chances[name] <= 1.0 for name in chances if name.endswith("_as_stated"))


def test_planted_copies_tell_what_the_search_is_worth(evaluated):
    for parts in result_of(evaluated)["results"].values():
        measures, record = parts["copies"]["measures"], parts["copies"]["record"]
        assert record["searched_share"] == 1.0
        for kind in ("features", "pixels"):
            found = measures[f"found_planted_{kind}"]
            assert found["samples"] == 40
            silent = found["value"] < record["needed_power"]
            assert ("Not meaningful here" in measures[f"closer_{kind}"]["about"]) == silent
            assert (measures[f"closer_{kind}"]["better"] == "none") == silent


def test_what_is_measured_on_real_images_alone_is_the_same_for_all_weights(evaluated):
    ema, raw = (parts["kernel"]["measures"] for parts in result_of(evaluated)["results"].values())
    shared = [name for name in ema if name.endswith(("_floor", "_of_autoencoder"))]
    assert len(shared) == 2 and all(ema[name] == raw[name] for name in shared)
    assert ema["kernel_efficientnet_lite0"] != raw["kernel_efficientnet_lite0"]


def test_an_evaluation_compared_with_itself_is_the_same(evaluated, tmp_path):
    out = tmp_path / "compared.json"
    assert evaluate.main(["compare", str(evaluated), str(evaluated), "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["measures"]
    assert {row["name"] for row in rows if row["primary"]} == {"loss.flow_loss", "kernel.kernel_efficientnet_lite0"}
    # Where all of few images agree, too, nothing says that others would.
    assert {row["verdict"] for row in rows if row["margin"]} <= {"the same", "not told apart"}
    assert all(row["difference"]["value"] == 0 and row["difference"]["p"] == 1 for row in rows)


def test_what_cannot_be_done_is_left_out_with_the_nearest_that_works(evaluated):
    left_out = {one["part"]: one for one in result_of(evaluated)["left_out"]}
    assert set(left_out) == {"frechet", "agreement", "shapes"}
    assert "needs at least 1281 images of each kind, there are 12 samples" in left_out["frechet"]["why"]
    assert "rely on kernel_efficientnet_lite0" in left_out["frechet"]["hint"]
    assert "there are 40" in left_out["agreement"]["why"]
    assert "hdm-shards build shapes" in left_out["shapes"]["hint"]


def test_everything_that_the_numbers_depend_on_is_pinned(evaluated, tiny_shards):
    result = result_of(evaluated)
    settings = result["settings"]
    assert (settings["seed"], settings["samples"], settings["sampling"]["steps"]) == (0, 12, 2)
    assert settings["networks"][0]["preprocessing"]["side_px"] == 224
    assert settings["networks"][0]["name"] == "efficientnet_lite0"
    assert settings["bootstrap"] == {"resamples": 50, "seed": 0, "confidence": 0.95}
    assert settings["data"]["reference"]["sources"] == [[str(tiny_shards)]]
    assert settings["environment"]["torch"] == torch.__version__
    assert set(result["subject"]["sha256"]) == {"ema", "raw"}
    assert result["subject"]["samples_seen"] == 4096


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(run_folder, tiny_shards, evaluated, tmp_path):
    arguments = [str(run_folder), "--data", str(tiny_shards), "--weights", "ema", "--parts", "kernel,loss", *SMALL]
    assert evaluate.main([*arguments, "--out", str(tmp_path / "again")]) == 0
    first, again = result_of(evaluated)["results"]["ema"], result_of(tmp_path / "again")["results"]["ema"]
    for part in ("kernel", "loss"):
        for name, measure in again[part]["measures"].items():
            expected = first[part]["measures"][name]
            for key in ("value", "low", "high"):
                assert measure[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), name
    assert evaluate.main([*arguments, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    other = result_of(tmp_path / "other")["results"]["ema"]
    assert other["loss"]["measures"]["flow_loss"]["value"] != again["loss"]["measures"]["flow_loss"]["value"]


def test_the_loss_of_raw_weights_is_compared_sample_by_sample(evaluated):
    results = result_of(evaluated)["results"]
    ema, raw = (results[weights]["loss"]["measures"] for weights in ("ema", "raw"))
    assert "flow_loss_minus_ema" not in ema
    difference = raw["flow_loss"]["value"] - ema["flow_loss"]["value"]
    assert raw["flow_loss_minus_ema"]["value"] == pytest.approx(difference)
    paired = raw["flow_loss_minus_ema"]["high"] - raw["flow_loss_minus_ema"]["low"]
    assert paired < 0.5 * (ema["flow_loss"]["high"] - ema["flow_loss"]["low"])


class Page(HTMLParser):
    """Everything that a page would load, and its pictures."""

    def __init__(self):
        super().__init__()
        self.sources, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_report_holds_all_pictures_and_loads_nothing(evaluated):
    text = (evaluated / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "prefers-color-scheme: dark" in text
    assert page.tags.count("svg") == 1
    assert "Left out" in text


def test_tensorboard_has_values_ends_and_pictures_at_the_samples_seen(evaluated):
    events = EventAccumulator(str(evaluated / "tensorboard" / "ema"), size_guidance={"images": 0})
    events.Reload()
    measures = result_of(evaluated)["results"]["ema"]["loss"]["measures"]
    (value,) = events.Scalars("evaluation/loss/flow_loss")
    (low,) = events.Scalars("evaluation/loss/flow_loss/low")
    assert (value.step, value.value) == (4096, pytest.approx(measures["flow_loss"]["value"]))
    assert low.value == pytest.approx(measures["flow_loss"]["low"])
    assert "evaluation/camera/images_0" in events.Tags()["images"]
    # A chart of a training takes in every run under the same folder by patterns such as loss/.*
    assert all(tag.startswith("evaluation/") for tag in [*events.Tags()["scalars"], *events.Tags()["images"]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "frechet"], "needs at least 1281 images of each kind, there are 12 samples"),
        (["--parts", "frechet", "--samples", "1400"], "there are 40 reference images"),
        (["--parts", "fid"], "--parts: 'fid' is not a part\n  hint: choose one of loss, frechet"),
        (["--parts", "copies"], "the search for copies needs the training set"),
        (["--features", "inception"], "pip install 'hdm-lightning[fid]', or use efficientnet_lite0"),
        (["--features", "./nowhere"], "--features: there is no folder './nowhere'"),
        (["--clip", "./nowhere"], "or leave --clip out"),
        (["--weights", "file"], "there are no file weights\n  hint: choose one of ema, raw"),
        (["--samples", "1"], "--samples: 1 is below 2"),
        (["--size", "30"], "--size: 30 is not a multiple of 4\n  hint: use 32"),
        (["--solver", "magic"], "--solver: 'magic' is not known"),
        (["--ratios", "wide"], "--ratios: 'wide' is not a list of ratios"),
        (["--device", "abacus"], "--device: 'abacus' is not a device"),
        (["--batch", "0"], "--batch: 0 is below 1"),
        (["--confidence", "1"], "--confidence: 1 is not below 1"),
        (["--camera-shift", "0"], "--camera-shift: 0 is not above 0"),
        (["--camera-zoom", "0"], "--camera-zoom: 0 is not above 0"),
    ],
)
def test_mistakes_are_told_on_one_screen_before_anything_is_drawn(
    run_folder, tiny_shards, tmp_path, capsys, arguments, message
):
    given = [*SMALL, *arguments] if "--samples" not in arguments else [*SMALL[2:], *arguments]
    assert evaluate.main([str(run_folder), "--data", str(tiny_shards), "--out", str(tmp_path / "o"), *given]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "generating" not in errors
    assert not (tmp_path / "o").exists()


def test_one_clip_for_captions_and_as_feature_network(run_folder, tiny_shards, tiny_text_encoder, tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**small, "vocab_size": 32, "max_position_embeddings": 12, "eos_token_id": 2}
    vision = {**small, "image_size": 24, "patch_size": 8}
    torch.manual_seed(0)
    folder = tmp_path / "clip"
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_text_encoder).save_pretrained(folder)
    preprocessing = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 24, "width": 24}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    arguments = ["--data", str(tiny_shards), "--weights", "ema", *SMALL, "--out", str(tmp_path / "out")]
    both = ["--clip", str(folder), "--features", str(folder), "--parts", "agreement,kernel,frechet"]
    assert evaluate.main([str(run_folder), *arguments, *both]) == 0
    parts = result_of(tmp_path / "out")["results"]["ema"]
    assert set(parts["agreement"]["measures"]) == {"clip_score_clip", "clip_score_clip_of_real"}
    assert {"cmmd_clip", "cmmd_clip_floor", "kernel_clip"} <= set(parts["kernel"]["measures"])
    assert set(parts["frechet"]["measures"]) == {"frechet_clip", "frechet_clip_floor", "frechet_clip_of_autoencoder"}
    for part in parts.values():  # of 12 drawn and 12 real pictures, each counted once
        assert {one["samples"] for name, one in part["measures"].items() if "autoencoder" not in name} == {12}


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "diffusers"])
def test_a_published_file_has_the_loss_of_the_folder_it_was_made_from(
    tiny_text_encoder, tiny_autoencoder, tiny_shards, tmp_path, name
):
    config = replace(CONFIG, **PUBLISHED)
    write_final(tmp_path / "final", tiny_text_encoder, tiny_autoencoder, shaken_state(config, seed=1), config=config)
    made, layout = tmp_path / name, ["--to", "diffusers"] if name == "diffusers" else []
    assert convert.main([str(tmp_path / "final"), str(made), *layout]) == 0
    given = ["--data", str(tiny_shards), "--parts", "loss", "--size", "32", *SMALL]
    given += ["--text-encoder", str(tiny_text_encoder), "--vae", str(tiny_autoencoder)]
    losses = []
    for model, weights in ((tmp_path / "final", "ema"), (made, "file")):
        assert evaluate.main([str(model), *given, "--out", str(tmp_path / "out")]) == 0
        result = result_of(tmp_path / "out")
        assert list(result["results"]) == [weights]
        losses.append(result["results"][weights]["loss"]["measures"]["flow_loss"]["value"])
        assert len(result["subject"]["sha256"][weights]) == 64
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_one_reference_picture_is_too_few_for_anything(run_folder, tmp_path, capsys):
    with ShardWriter(tmp_path / "one") as writer:
        file = io.BytesIO()
        Image.new("RGB", (40, 40)).save(file, "PNG")
        writer.write("0", {"png": file.getvalue(), "txt": "a"})
    assert evaluate.main([str(run_folder), "--data", str(tmp_path / "one"), "--parts", "kernel"]) == 2
    assert "--data: found 1 readable reference images, at least 2 are needed" in capsys.readouterr().err


def test_pictures_that_cannot_be_read_are_missed_before_drawing(run_folder, tiny_shards, monkeypatch, tmp_path, capsys):
    def broken(stream, plan, count):  # of the 40 that the index promises, four can be read
        yield from (
            batch._replace(images=batch.images[:4], captions=batch.captions[:4], keys=batch.keys[:4])
            for batch in list(real_images(stream, plan, count))[:1]
        )

    monkeypatch.setattr("hdm_lightning.evaluation.context.real_images", broken)
    arguments = ["--data", str(tiny_shards), "--out", str(tmp_path), *SMALL, "--parts", "neighbours"]
    assert evaluate.main([str(run_folder), *arguments]) == 2
    errors = capsys.readouterr().err
    assert "more than 5 images of each kind, there are 4" in errors
    assert "generating" not in errors


def test_a_folder_that_cannot_be_written_is_told_before_the_work(run_folder, tiny_shards, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    arguments = [str(run_folder), "--data", str(tiny_shards), "--out", str(tmp_path / "file" / "out"), *SMALL]
    assert evaluate.main(arguments) == 2
    errors = capsys.readouterr().err
    assert "--out:" in errors
    assert "flow loss" not in errors


def test_equal_captions_and_records_of_another_kind_leave_their_parts_out(run_folder, tmp_path):
    with ShardWriter(tmp_path / "alike") as writer:
        for number in range(8):
            file = io.BytesIO()
            Image.new("RGB", (40, 40), (30 * number, 9, 9)).save(file, "PNG")
            record = {"objects": [3, 4], "background": "white"}
            writer.write(str(number), {"png": file.getvalue(), "txt": "a circle", "json": record})
    arguments = ["--data", str(tmp_path / "alike"), "--out", str(tmp_path / "out"), "--weights", "ema", *SMALL, *FEW]
    assert evaluate.main([str(run_folder), *arguments]) == 0
    reasons = {one["part"]: one["why"] for one in result_of(tmp_path / "out")["left_out"]}
    assert reasons["aspect"] == "aspect ratios need two different captions"
    assert reasons["camera"] == "the camera's response needs two different captions"
    assert reasons["shapes"].startswith("the reference images are not scenes of shapes")


def test_without_real_pictures_the_hint_is_told(run_folder, capsys):
    assert evaluate.main([str(run_folder)]) == 2
    assert "--data: there are no real images to compare with" in capsys.readouterr().err


def test_without_the_default_network_the_rest_is_measured(run_folder, tiny_shards, tmp_path, monkeypatch):
    def cannot(name, device):
        raise UserError("its package is not installed", where="--features", hint="pip install it")

    monkeypatch.setattr("hdm_lightning.evaluation.evaluate_model.load_feature_network", cannot)
    arguments = [str(run_folder), "--data", str(tiny_shards), "--weights", "raw", *SMALL, *FEW]
    assert evaluate.main([*arguments, "--out", str(tmp_path)]) == 0
    result = result_of(tmp_path)
    assert set(result["results"]["raw"]) == {"loss", "camera"}
    reasons = {one["part"]: one["why"] for one in result["left_out"]}
    assert reasons["kernel"] == reasons["aspect"] == "its package is not installed"
    assert evaluate.main([*arguments, "--parts", "kernel", "--out", str(tmp_path / "o")]) == 2


def test_help_waits_for_no_torch():
    check = "import sys, hdm_lightning.cli.evaluate; sys.exit(bool({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_every_part_leads_to_a_function():
    for key in PARTS:
        assert isinstance(measuring(key), Measuring)


def test_values_of_a_repeated_flag_leave_the_model_to_be_the_model(run_folder, tiny_shards, tmp_path):
    data, out = ["--data", str(tiny_shards)], tmp_path / "out"
    arguments = ["--parts", "loss", "--weights", "ema", *SMALL, "--out", str(out), *data, *data, str(run_folder)]
    assert evaluate.main(arguments) == 0
    result = result_of(out)
    assert result["settings"]["data"]["reference"]["sources"] == [[str(tiny_shards)] * 2]
    assert result["command"].split()[-1] == str(run_folder)
    datetime.fromisoformat(result["date"])


def test_an_autoencoder_is_measured(tiny_autoencoder, tiny_shards, tmp_path, capsys):
    arguments = ["vae", str(tiny_autoencoder), "--data", str(tiny_shards), "--size", "32", "--out", str(tmp_path)]
    assert evaluate.main([*arguments, "--samples", "12", "--resamples", "50"]) == 0
    assert "reconstruction_psnr_db" in capsys.readouterr().out
    result = result_of(tmp_path)
    measures = result["results"]["vae"]["autoencoder"]["measures"]
    assert {"reconstruction_psnr_db", "reconstruction_ssim", "equivariance_encoder_rotation"} <= set(measures)
    assert all(measure["low"] <= measure["value"] <= measure["high"] for measure in measures.values())
    assert result["results"]["vae"]["distances"]["measures"]["kernel_efficientnet_lite0"]["samples"] == 6
    assert result["left_out"][0]["part"] == "rfrechet_efficientnet_lite0"
    assert "data:image/" in (tmp_path / "report.html").read_text()
    (weights,) = tiny_autoencoder.glob("*.safetensors")
    assert result["subject"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert evaluate.main(["vae", "./nowhere", "--data", str(tiny_shards), "--out", str(tmp_path)]) == 2
    assert "FOLDER: there is no folder 'nowhere'" in capsys.readouterr().err
    small = ["--size", "4", "--out", str(tmp_path)]
    assert evaluate.main(["vae", str(tiny_autoencoder), "--data", str(tiny_shards), *small]) == 2
    assert "--size: 4 px are too few to measure\n  hint: use at least 6" in capsys.readouterr().err


@pytest.fixture
def broken_part(monkeypatch):
    """Context in which a part of the evaluation raises an error, for all weights or for some."""

    @contextmanager
    def broken(key, error, weights=("ema", "raw")):
        measure = measuring(key)

        def fails(context):
            if context.weights in weights:
                raise error
            return measure.run(context)

        with monkeypatch.context() as patch:
            function = PARTS[key].function.replace(":", ".")
            patch.setattr(f"hdm_lightning.evaluation.{function}", Measuring(fails))
            yield

    return broken


@pytest.mark.parametrize("error", [RuntimeError("the disk was pulled out"), UserError("the disk was pulled out")])
def test_a_part_that_fails_costs_no_other(run_folder, tiny_shards, tmp_path, broken_part, capsys, error):
    arguments = [str(run_folder), "--data", str(tiny_shards), *SMALL, *FEW, "--out", str(tmp_path)]
    with broken_part("loss", error):
        assert evaluate.main([*arguments, "--parts", "loss,camera"]) == 1
    errors = capsys.readouterr().err
    assert "loss (ema) failed" in errors and "loss (raw) failed" in errors and "pulled out" in errors
    result = result_of(tmp_path)
    assert {weights: set(parts) for weights, parts in result["results"].items()} == {
        "ema": {"camera"},
        "raw": {"camera"},
    }
    assert [(one["part"], one["weights"]) for one in result["failed"]] == [("loss", "ema"), ("loss", "raw")]
    assert all("pulled out" in one["error"] for one in result["failed"])
    assert "pulled out" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "evaluation.partial.json").exists()


def test_a_part_that_turns_out_impossible_for_the_second_weights_alone_failed_for_them(
    run_folder, tiny_shards, tmp_path, broken_part
):
    arguments = [str(run_folder), "--data", str(tiny_shards), *SMALL, *FEW, "--out", str(tmp_path)]
    with broken_part("loss", UserError("too few"), ["raw"]), broken_part("camera", UserError("too few"), ["ema"]):
        assert evaluate.main(arguments) == 1
    result = result_of(tmp_path)
    assert "loss" in result["results"]["ema"] and "loss" not in result["results"]["raw"]
    assert [(one["part"], one["weights"]) for one in result["failed"]] == [("loss", "raw")]
    left_out = {one["part"] for one in result["left_out"]}
    assert "camera" in left_out and "loss" not in left_out


def test_where_no_part_succeeds_the_first_error_is_the_commands(run_folder, tiny_shards, tmp_path, broken_part):
    arguments = [str(run_folder), "--data", str(tiny_shards), *SMALL, "--parts", "loss", "--out", str(tmp_path)]
    with broken_part("loss", RuntimeError("pulled out")), pytest.raises(RuntimeError, match="pulled out"):
        evaluate.main(arguments)
    assert not (tmp_path / "evaluation.json").exists()


def test_duplicates_among_the_pictures_leave_every_number_finite(run_folder, tmp_path):
    with ShardWriter(tmp_path / "doubled", samples_per_shard=16) as writer:
        for number in range(32):  # 16 different pictures, each twice, and the last of them four times more
            shade = 15 * min(number % 16, 13)
            file = io.BytesIO()
            Image.linear_gradient("L").resize((40, 40)).convert("RGB").point(lambda v, s=shade: v ^ s).save(file, "PNG")
            writer.write(f"{number:03d}", {"png": file.getvalue(), "txt": f"a {WORDS[number % 8]} circle"})
    data = ["--data", str(tmp_path / "doubled"), "--train-data", str(tmp_path / "doubled")]
    arguments = [str(run_folder), *data, "--weights", "raw", *SMALL, *FEW, "--samples", "32"]
    assert evaluate.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    result = result_of(tmp_path / "out")
    assert not result["failed"]
    parts = result["results"]["raw"]
    assert {"kernel", "neighbours", "diversity", "copies"} <= set(parts)
    values = {(key, name): one for key, part in parts.items() for name, one in part["measures"].items()}
    assert not [where for where, one in values.items() if not all(map(math.isfinite, (one["value"], one["low"])))]
    # Each held-out picture has its double in the training set: there is no distance to be a share of.
    assert ("copies", "distance_ratio_features") not in values


def test_what_was_measured_before_an_interruption_is_kept_until_the_whole_is_there(
    run_folder, tiny_shards, tmp_path, broken_part
):
    arguments = [str(run_folder), "--data", str(tiny_shards), "--weights", "raw", *SMALL, *FEW]
    arguments += ["--parts", "loss,camera", "--out", str(tmp_path)]
    with broken_part("camera", KeyboardInterrupt()):
        assert evaluate.main(arguments) == 130
    partial = json.loads((tmp_path / "evaluation.partial.json").read_text())
    assert not (tmp_path / "evaluation.json").exists()
    assert evaluate.main(arguments) == 0
    assert not (tmp_path / "evaluation.partial.json").exists()
    whole = result_of(tmp_path)
    assert set(partial["results"]["raw"]) == {"loss"} and set(whole["results"]["raw"]) == {"loss", "camera"}
    assert partial["results"]["raw"]["loss"] == whole["results"]["raw"]["loss"]
    assert partial["settings"] == whole["settings"]


def test_a_mistyped_command_is_told_from_a_word_too_many(capsys):
    assert evaluate.main(["compaer", "runs/a", "runs/b"]) == 2
    assert "did you mean 'compare'?" in capsys.readouterr().err
    assert evaluate.main(["runs/a", "runs/b"]) == 2
    assert "unexpected argument 'runs/b'" in capsys.readouterr().err
