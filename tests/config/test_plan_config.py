"""hdm-plan's configuration: every training key understood, its own keys checked, messages that name the hint."""

import functools
import io
import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hdm_lightning import ShardDataModule, load_text_encoder
from hdm_lightning.cli.overrides import composed
from hdm_lightning.cli.plan_schedule import run_plan
from hdm_lightning.errors import UserError
from hdm_lightning.profiling.duration import PAPER_HOURS, Assumptions
from hdm_lightning.profiling.gpus import GPUS, Host, Machine
from hdm_lightning.profiling.plan_report import PRESETS, presets_for
from hdm_lightning.profiling.planned_run import Dataset
from hdm_lightning.training.recorded import recorded_values


@functools.cache
def planned(*overrides):
    return run_plan(recorded_values(composed("plan", overrides)))


def shown(result):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(result.report)
    return console.export_text()


def test_the_paper_s_schedule_from_the_configuration():
    content = planned("schedule=paper", "model=xut_base", "gpus=4x5090").content
    hours = {stage["stage"]["resolution"]: stage["hours"] for stage in content["stages"]}
    assert hours == {side: pytest.approx(paper, rel=0.25) for side, paper in PAPER_HOURS.items()}
    assert content["recipe"]["parameters"] == 343_176_208
    assert content["recipe"]["compiled"] and content["recipe"]["mixed"]
    json.dumps(content)


ROOT = Path(__file__).parents[2]
OF_THE_PAPER = ["experiment=paper_small", "model=xut_base", "experiment=paper_large", "experiment=paper_cached"]


@pytest.mark.parametrize("size", OF_THE_PAPER)
def test_the_paper_s_recipe_fits_24_and_32_gib_as_it_is(size):
    for plan in planned(size, "gpus=[4x5090,4x4090,4x3090]").content["plans"]:
        assert all(stage["fits"] and not stage["notes"] for stage in plan["stages"])
        assert [stage["stage"]["batch_size"] for stage in plan["stages"]] == [2048, 512, 512, 256]


def test_the_limits_of_the_encoders_reach_the_plan():
    usual = planned("gpus=4x4090").content
    small = planned("gpus=4x4090", "vae.max_pixels=1", "text_encoder.max_tokens=1").content
    assert [stage["autoencoder_batch"] for stage in usual["stages"]] == [32, 20, 9, 5]
    assert [stage["text_batch"] for stage in usual["stages"]] == [32, 64, 64, 16]
    assert (
        {stage["autoencoder_batch"] for stage in small["stages"]} == {1} == {s["text_batch"] for s in small["stages"]}
    )


def test_captions_of_a_mean_length_cost_what_they_are_padded_to():
    """Of 64 tokens on average the network's operations fall by a third at 256 pixels, the memory stays."""
    filled, short, padded, own = (
        planned("gpus=4x5090", *changes).content["stages"]
        for changes in (
            [],
            ["dataset.caption_tokens=64"],
            ["dataset.caption_tokens=64", "data.text_lengths=padded"],
            ["dataset.caption_tokens=[64,64]", "data.text_lengths=[64]"],
        )
    )
    differing = {"useful_flops", "padding_share", "mfu"}
    for one, other in zip(padded, filled, strict=True):
        assert {key for key in one if one[key] != other[key]} == differing
        assert one["padding_share"] == pytest.approx(1 - 64 / one["stage"]["context_length"], abs=0.02)
    for whole, part in zip(filled, short, strict=True):
        assert part["memory"] == whole["memory"] and part["largest_micro_batch"] == whole["largest_micro_batch"]
        assert part["operations"]["autoencoder"] == whole["operations"]["autoencoder"]
        assert part["hours"] < whole["hours"] and 64 < part["text_tokens"] < whole["text_tokens"]
        assert part["images_per_s"] > whole["images_per_s"]
    ratio = [each["operations"]["text"] / filled[0]["operations"]["text"] for each in (short[0], own[0])]
    assert 0.25 < ratio[0] < 0.4 and ratio[1] == pytest.approx(64 / 256, rel=0.15)
    assert {each["text_tokens"] for each in own} == {64} and {each["padding_share"] for each in own} == {0}


@pytest.mark.parametrize("wrong", ["0", "[8]", "[64,8]", "much"])
def test_lengths_of_captions_that_make_no_sense_are_named(wrong):
    with pytest.raises(UserError, match=r"dataset\.caption_tokens"):
        planned(f"dataset.caption_tokens={wrong}")


def test_defaults_of_the_file_are_those_of_the_package():
    content = planned().content
    assert content["machine"]["host"] == vars(Host())
    assert content["recipe"]["dataset"] == vars(Dataset())
    assert content["assumptions"] == vars(Assumptions())


@pytest.mark.parametrize(
    ("model", "text"), [("xut_small", "gemma3_270m"), ("xut_base", "qwen3_0.6b"), ("xut_large", "gemma3_1b")]
)
def test_every_size_with_its_text_encoder(model, text):
    content = planned(f"model={model}", f"text_encoder={text}").content
    assert content["total"]["rent_usd"]["expected"] > 100


@pytest.mark.parametrize(("given", "mixed"), [("auto", True), ("null", True), ("bf16-mixed", True), ("32-true", False)])
def test_a_precision_is_what_training_takes_it_for(given, mixed):
    assert planned(f"trainer.precision={given}").content["recipe"]["mixed"] == mixed


def test_overrides_reach_the_forecast():
    usual, changed = (
        planned().content,
        planned("schedule.stages.px512.samples=4234500", "gpu.usd_per_hour=0.75").content,
    )
    assert changed["stages"][1]["hours"] == pytest.approx(0.1 * usual["stages"][1]["hours"], rel=1e-3)
    assert changed["stages"][0]["rent_usd"] == pytest.approx(2 * usual["stages"][0]["rent_usd"])
    slow = planned("hardware.compile=false").content
    assert slow["stages"][0]["hours"] > 1.1 * usual["stages"][0]["hours"]


def test_every_kind_of_average_takes_memory_and_disk():
    one, three = planned().content, planned("callbacks.weight_averages.sigma_rel=[0.05,0.1]").content
    weights = 4 * 343_176_208
    assert one["stages"][0]["memory"]["averages"] == weights
    assert three["stages"][0]["memory"]["averages"] == 3 * weights
    assert three["storage"]["checkpoint_gb"] - one["storage"]["checkpoint_gb"] == pytest.approx(2 * weights / 1e9)


def test_moments_of_8_bits_take_a_byte_and_a_scale():
    wide, narrow = (planned(f"optimizer={name}").content["stages"][0]["memory"] for name in ("adamw", "adamw8bit"))
    assert narrow["optimizer"] / wide["optimizer"] == pytest.approx(65 / 256, rel=1e-6)


def test_muon_keeps_one_moment_of_the_blocks_matrices():
    adamw, muon = (planned(f"optimizer={name}").content["stages"][0]["memory"] for name in ("adamw", "muon"))
    assert 0.5 < muon["optimizer"] / adamw["optimizer"] < 0.6
    assert muon["weights"] == adamw["weights"]


def test_an_adapter_takes_less_memory_disk_and_time_than_all_weights():
    whole, lora = planned().content, planned("adapter=lora", "module.rule=constant").content
    trained = lora["recipe"]["trained"]
    assert whole["recipe"]["trained"] == whole["recipe"]["parameters"] == lora["recipe"]["parameters"] - trained
    assert lora["stages"][0]["memory"]["optimizer"] == 8 * trained
    assert lora["stages"][0]["memory"]["weights"] == 4 * lora["recipe"]["parameters"]
    assert lora["storage"]["checkpoint_gb"] < 0.1 * whole["storage"]["checkpoint_gb"]
    assert 0.5 < lora["total"]["hours"] / whole["total"]["hours"] < 0.9
    smaller = planned("adapter=lycoris", "module.rule=constant").content
    assert smaller["recipe"]["trained"] < 0.2 * trained


def test_several_machines_are_compared():
    result = planned("gpus=[4x5090,4x4090,4x3090,1x4090]")
    hours = [plan["total"]["hours"] for plan in result.content["plans"]]
    assert hours[0] < hours[1] < hours[2] < hours[3]
    assert hours[3] == pytest.approx(4 * hours[1], rel=0.02)
    assert "4x3090" in shown(result)


def test_a_budget_turns_the_plan_around():
    result = planned("budget_usd=300")
    assert 297 < result.content["total"]["rent_usd"]["expected"] <= 300
    assert result.content["share"] == pytest.approx(300 / planned().content["total"]["rent_usd"]["expected"])
    assert result.content["overrides"][0] in shown(result)


def test_the_report_names_the_stages_and_what_does_not_fit():
    text = shown(planned())
    for word in ("px256", "px1024", "images/s", "peak", "binds", "micro_batch_size=", "padded text states"):
        assert word in text


def test_a_sharded_run_names_what_it_gathers():
    text = shown(planned("trainer.strategy=fsdp2"))
    assert "gathered weights" in text
    assert "half-precision weights" not in text


@pytest.mark.parametrize(
    ("overrides", "where", "hint"),
    [
        (["gpus=4x5091"], "gpus", "4x5090"),
        (["gpus=3x5090"], "schedule.stages.px256.batch_size", "batch_size="),
        (["budget_usd=3"], "budget_usd", "budget_usd="),
        (["gpus=[4x5090,1x4090]", "budget_usd=600"], "gpus", "gpus=4x5090"),
        (["assumptions.utilisation=1.5"], "assumptions.utilisation", "1 or less"),
        (["gpu.memory_gib=-1"], "gpu.memory_gib", "use one"),
        (["schedule.stages.px256.resolution=250"], "schedule.stages.px256.resolution", "256"),
        (["text_encoder=gemma3_1b"], "model.context_width", "1152"),
        (["vae.name=/nowhere/at/all"], "vae.name", "KBlueLeaf/EQ-SDXL-VAE"),
        (["+host.coers=3"], "host.coers", "cores"),
        (["gpus=[]"], "gpus", "gpus=4x5090"),
        (["adapter=lora", "adapter.targets=[atention]"], "adapter.targets", "attention"),
        (["adapter=lora", "+adapter.dropout=0.1"], "adapter.dropout", "rank"),
        (["trainer.precision=16-true"], "trainer.precision", "auto"),
        (["trainer.strategy=fsdp"], "trainer.strategy", "auto"),
        (["vae.max_pixels=0"], "vae.max_pixels", "1 or more"),
        (["text_encoder.max_tokens=-1"], "text_encoder.max_tokens", "1 or more"),
        (["out=/dev/null/plan.json"], "out", "another path"),
        (["host.cores=0"], "host.cores", "above 0"),
        (["host.disk_mb_s=-1"], "host.disk_mb_s", "above 0"),
        (["dataset.image_mpx=0"], "dataset.image_mpx", "above 0"),
        (["probe_settings.steps=0"], "probe_settings.steps", "above 0"),
        (["probe_settings.warmup=-1"], "probe_settings.warmup", "0 or more"),
        (["probe=true", "gpus=4x5090"], "probe", "gpus=here"),
    ],
)
def test_mistakes_are_named(overrides, where, hint, monkeypatch):
    monkeypatch.setattr("hdm_lightning.profiling.system.CPU_MATMUL", 64)
    monkeypatch.setattr("hdm_lightning.profiling.system.CPU_COPY_MIB", 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        planned(*overrides)
    assert caught.value.where == where
    assert hint in caught.value.hint


def test_stages_that_read_latents_run_no_autoencoder(tmp_path):
    """Told by what lies in `data.train`, or by `dataset.latents`; a stage with shards of its own is told by these."""
    (tmp_path / "256px").mkdir()
    (tmp_path / "256px" / "latents.json").write_text("{}")
    online = planned("gpus=4x5090").content["stages"]
    found = planned("gpus=4x5090", f"data.train={tmp_path}").content["stages"]
    assert [stage["operations"]["autoencoder"] > 0 for stage in found] == [False, True, True, True]
    own = "+schedule.stages.px1024.data.train=/images"
    said = planned("schedule=paper", "gpus=4x5090", "dataset.latents=true", own).content["stages"]
    assert [stage["operations"]["autoencoder"] > 0 for stage in said] == [False, False, False, True]
    for stage, before in zip(said[:3], online[:3], strict=True):
        assert stage["total_flops"] + before["operations"]["autoencoder"] * stage["stage"]["samples"] == pytest.approx(
            before["total_flops"]
        )
        assert stage["hours"] < 0.8 * before["hours"] and stage["memory"]["total"] <= before["memory"]["total"]
        cells = (stage["stage"]["resolution"] // 8) ** 2
        assert stage["read_mb_s"] / stage["images_per_s"] == pytest.approx((8 * 1.3 * cells + 3000) / 1e6)
    assert found[3]["hours"] == online[3]["hours"]


def test_the_cached_preset_is_billed_with_its_encoding():
    """On four RTX 5090, captions of 64 tokens: both sets are in the rent, which is told as a range."""
    content = planned("experiment=paper_cached", "gpus=4x5090", "dataset.caption_tokens=64").content
    stages, sets, rent = content["stages"], content["encodings"], content["total"]["rent_usd"]
    assert [each["resolution"] for each in sets] == [256, 512]
    assert [stage["operations"]["autoencoder"] > 0 for stage in stages] == [False, False, True, True]
    assert not any(stage["operations"]["recompute"] for stage in stages)
    assert rent["expected"] == pytest.approx(sum(each["rent_usd"] for each in (*sets, *stages)))
    assert rent["low"] < 0.85 * rent["expected"] and 1.2 * rent["expected"] < rent["high"]
    assert rent["expected"] <= 290
    usual = planned("gpus=4x5090").content
    assert not usual["encodings"] and usual["total"]["rent_usd"]["expected"] > 1.7 * rent["expected"]


def test_captions_are_counted_in_the_data_where_they_are(tiny_shards, tiny_text_encoder, tiny_autoencoder):
    """As a training would tokenize them, those that it drops included."""
    here = [f"data.train={tiny_shards}", f"text_encoder.name={tiny_text_encoder}", f"vae.name={tiny_autoencoder}"]
    here += ["model.context_width=16", "gpus=1x4090"]
    tokenize = load_text_encoder(str(tiny_text_encoder)).tokenizer.bind(512)
    data = ShardDataModule(
        tiny_shards, resolution=256, batch_size=1, tokenizer=tokenize, context_length=512, num_workers=0, stage="px256"
    )
    stream = data.train_dataloader()
    lengths = sorted(int(batch["lengths"]) for batch in islice(stream, data.train_plan.samples))
    counted = planned(*here).content["recipe"]["dataset"]["caption_tokens"]
    assert len(counted) == 33 and counted[0] == lengths[0] and counted[-1] == lengths[-1]
    assert counted[16] == pytest.approx(np.median(lengths), abs=1)
    said = planned(*here, "dataset.caption_tokens=5").content["recipe"]["dataset"]["caption_tokens"]
    assert said == 5


def test_a_set_without_its_tokenizer_counts_full_captions(tiny_shards, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    content = planned(f"data.train={tiny_shards}", "text_encoder.name=Qwen/Qwen3-0.6B").content
    assert content["recipe"]["dataset"]["caption_tokens"] is None


def test_text_states_on_disk_are_told_by_the_run_s_own_keys():
    """Of all stages, but for one that encodes its captions as they come."""
    online = planned("gpus=4x5090", "dataset.caption_tokens=64").content
    own = "+schedule.stages.px1024.data.text_states=null"
    found = planned("gpus=4x5090", "dataset.caption_tokens=64", "data.text_states=/states", own).content
    assert [stage["operations"]["text"] > 0 for stage in found["stages"]] == [False, False, False, True]
    assert not online["encodings"] and [each["resolution"] for each in found["encodings"]] == [None]
    assert found["total"]["rent_usd"]["expected"] < online["total"]["rent_usd"]["expected"]


def test_overlapped_encoders_are_told_by_the_run_s_own_key():
    apart, together = (
        planned("gpus=4x5090", f"hardware.overlap_encoders={overlapped}").content["stages"][0]["memory"]
        for overlapped in ("false", "true")
    )
    assert together["total"] - apart["total"] == apart["inputs"] + apart["encoding"]


def test_few_samples_of_a_resolution_are_no_reason_to_encode_all():
    stages = planned("gpus=4x5090", "dataset.latents=true").content["stages"]
    told = [any("use images instead of latents" in text for text in stage["savings"]) for stage in stages]
    assert told == [False, False, True, True]


def test_every_preset_that_is_proposed_for_a_card_fits_it():
    """On every card of the table, alone and in fours, as the preset stands."""
    offered = {}
    for gpu in GPUS.values():
        for count in (1, 4):
            for preset in presets_for(Machine(gpu, count)):
                offered.setdefault(preset.name, []).append(f"{1 if preset.alone else count}x{gpu.name}")
    assert set(offered) == {preset.name for preset in PRESETS}
    for name, machines in offered.items():
        for plan in planned(f"experiment={name}", f"gpus=[{','.join([*machines, machines[0]])}]").content["plans"]:
            assert all(stage["fits"] for stage in plan["stages"]), (name, plan["machine"])


def test_presets_are_proposed_where_none_was_chosen():
    assert "hdm-plan experiment=weekend_24gb gpus=1x4090" in shown(planned("gpus=1x4090"))
    smaller = shown(planned("gpus=1x4080"))
    assert "weekend_24gb" not in smaller and "evening_gpu" in smaller
    assert "presets" not in shown(planned("gpus=1x4090", "experiment=weekend_24gb"))


CACHED = ("experiment=paper_cached", "dataset.caption_tokens=64")


def test_what_the_documents_name_for_each_card_fits_and_takes_what_they_say():
    """The rows of docs/performance.md, with the overrides that stand in them."""
    text = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| \d+ GB, `(gpus=\w+)` \| (.*) \| (\d+) \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(rows) == 4
    for gpus, peaks, hours, more in rows:
        overrides = more.strip("`").split() if more.startswith("`schedule.") else []
        content = planned(*CACHED, gpus, *overrides).content
        assert all(stage["fits"] and not stage["notes"] for stage in content["stages"]), gpus
        found = [stage["memory"]["total"] / 2**30 for stage in content["stages"]]
        assert [float(each) for each in peaks.split(" · ")] == pytest.approx(found, abs=0.051)
        assert int(hours) == round(content["total"]["hours"])


def test_the_documents_tell_the_rents_that_the_command_does():
    """Of docs/performance.md and of "What the same samples could cost" in experiments/plans."""

    def rent(*overrides):
        return planned("gpus=4x5090", *overrides).content["total"]["rent_usd"]

    page = (ROOT / "docs" / "performance.md").read_text()
    cached, paper, stored = rent(*CACHED), rent("schedule=paper"), rent(*CACHED, "data.text_states=/states")
    padded = rent("schedule=paper", CACHED[1])
    told = {int(amount.replace(",", "")) for amount in re.findall(r"\$([\d,]+)", page)}
    figures = [*cached.values(), *(each["expected"] for each in (paper, stored, padded))]
    assert {round(figure) for figure in figures} <= told

    readme = (ROOT / "experiments" / "plans" / "README.md").read_text().partition("could cost")[2]
    lines = re.findall(r"^\| (… )?`([^`]+)`.* \| \**(\d+)\**[^|]*\|$", readme, flags=re.MULTILINE)
    assert len(lines) == 10
    for more, overrides, dollars in lines:
        found = rent(CACHED[1], *(CACHED[:1] if more else ()), *overrides.split())
        assert found["expected"] == pytest.approx(int(dollars), abs=0.5), overrides
