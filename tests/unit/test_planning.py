"""Plans of schedules: the paper's hours, units, what fits, budgets and messages."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hdm_lightning.errors import UserError
from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.profiling.duration import (
    CALIBRATED_UTILISATION,
    PAPER_HOURS,
    PAPER_MACHINE,
    UTILISATION_SPREAD,
    Assumptions,
    exchange_seconds,
    step_time,
)
from hdm_lightning.profiling.encoder_costs import QWEN3_0_6B, SDXL_AUTOENCODER, EncoderConfigs
from hdm_lightning.profiling.forecast import forecast, least_samples, propose, smallest
from hdm_lightning.profiling.gpus import GPUS, Host, Machine
from hdm_lightning.profiling.memory import (
    GIB,
    device_memory,
    fitting_encoder_batches,
    largest_micro_batch,
    usable_micro_batch,
)
from hdm_lightning.profiling.operations import attention_score_flops, training_flops
from hdm_lightning.profiling.padding import SPREAD, even_lengths
from hdm_lightning.profiling.planned_run import Dataset, Recipe, StageRecipe

PAPER = Recipe(
    XUTConfig(),
    (
        StageRecipe("px256", 256, 152_480_000, 2048, 32, 0.5, 256, False, 2_048_000),
        StageRecipe("px512", 512, 42_345_000, 512, 64, 0.5, 256, True, 512_000),
        StageRecipe("px768", 768, 8_469_000, 512, 64, 0.5, 256, True, 512_000),
        StageRecipe("px1024", 1024, 3_649_000, 256, 16, 0.0, 512, True, 256_000),
    ),
    *EncoderConfigs(QWEN3_0_6B, SDXL_AUTOENCODER).architectures(),
)


def test_one_utilisation_gives_the_paper_s_four_stage_times_within_a_quarter():
    plan = forecast(PAPER, PAPER_MACHINE)
    assert {stage.utilisation for stage in plan.stages} == {CALIBRATED_UTILISATION}
    for stage in plan.stages:
        assert stage.hours == pytest.approx(PAPER_HOURS[stage.stage.resolution], rel=0.25)
    assert plan.total("hours") == pytest.approx(sum(PAPER_HOURS.values()), rel=0.10)
    assert 500 < plan.total("rent_usd") < 620  # the paper says 535 to 620


def test_the_default_utilisation_makes_the_largest_error_against_the_paper_smallest():
    def largest_error(utilisation):
        steps = [step_time(PAPER, stage, PAPER_MACHINE, stage.micro_batch_size, utilisation) for stage in PAPER.stages]
        hours = [stage.steps * step.device / 3600 for stage, step in zip(PAPER.stages, steps, strict=True)]
        return max(abs(own / paper - 1) for own, paper in zip(hours, PAPER_HOURS.values(), strict=True))

    best = min((thousandths / 1000 for thousandths in range(200, 1001)), key=largest_error)
    assert best == pytest.approx(CALIBRATED_UTILISATION, abs=0.005)


def test_the_spread_is_that_of_the_paper_s_stages_each_alone():
    """The utilisation with which a stage takes the paper's hours, over the one that fits all."""
    alone = [stage.hours / PAPER_HOURS[stage.stage.resolution] for stage in forecast(PAPER, PAPER_MACHINE).stages]
    assert pytest.approx((min(alone), max(alone)), abs=0.005) == UTILISATION_SPREAD


def test_encoding_is_billed_by_hand():
    """Whole images of 1.3 squares, each once, on both devices; a slow host binds."""
    stages = tuple(replace(stage, cached=number < 2) for number, stage in enumerate(PAPER.stages))
    recipe = replace(PAPER, stages=stages, dataset=Dataset(images=1_000_000, image_mpx=0.1))
    machine = Machine(replace(GPUS["5090"], peak_tflops=100.0, bandwidth_gb_s=1000.0, usd_per_hour=2.0), 2)
    plan = forecast(recipe, machine, Assumptions(utilisation=0.5))
    assert [each.resolution for each in plan.encodings] == [256, 512]
    second, encoder = plan.encodings[1], recipe.autoencoder
    seconds = encoder.encode_flops(512, 664) / 1e14 + encoder.encode_traffic_bytes(512, 664) / 1e12
    assert second.hours == pytest.approx(1e6 * seconds / 0.5 / 2 / 3600)
    assert second.rent_usd == pytest.approx(2 * 2.0 * second.hours) and second.binds != "data"
    assert second.disk_gb == pytest.approx((2 * 4 * 1.3 * 64 * 64 + 3000) / 1e3)
    assert plan.storage.latents_gb == pytest.approx(sum(each.disk_gb for each in plan.encodings))
    assert plan.total("hours") == pytest.approx(sum(each.hours for each in (*plan.encodings, *plan.stages)))
    slow = forecast(recipe, replace(machine, host=Host(cores=1, decode_mpx_per_core_s=4))).encodings
    assert {each.binds for each in slow} == {"data"} and slow[0].images_per_s == pytest.approx(40)


@pytest.mark.parametrize("captions", [None, 64.0])
def test_stored_text_states_are_encoded_once_and_read(captions):
    """By hand: a stage has no operations, traffic or room of the text encoder.

    Captions longer than 256 tokens are stored twice: cut to 256 and to 512.
    """
    dataset = Dataset(images=1_000_000, caption_tokens=captions)
    online = replace(PAPER, dataset=dataset, text_lengths="bucketed")
    stored = replace(online, stages=tuple(replace(stage, text_stored=True) for stage in PAPER.stages))
    machine, assumed = Machine(replace(GPUS["5090"], peak_tflops=100.0, bandwidth_gb_s=1000.0), 4), Assumptions(0.5)
    before, after = (forecast(recipe, machine, assumed) for recipe in (online, stored))
    for old, new in zip(before.stages, after.stages, strict=True):
        stage, text = old.stage, online.text
        assert new.operations == replace(old.operations, text=0) and old.operations.text > 0
        traffic = sum(share * text.traffic_bytes(each.context_length) for share, each in online.padded(stage))
        spared = old.operations.text / 1e14 + traffic / 1e12
        assert old.hours - new.hours == pytest.approx(stage.samples * spared / 0.5 / 4 / 3600, rel=1e-3)
        lengths = online.true_lengths(stage)
        read = [each.read_mb_s / each.images_per_s * 1e6 for each in (old, new)]
        assert read[1] - read[0] == pytest.approx(2 * 1024 * sum(lengths) / len(lengths))
        states = stage.micro_batch_size * 2 * 1024 * stage.context_length
        assert new.memory.inputs - old.memory.inputs == states and new.memory.activations == old.memory.activations
    (encoding,) = after.encodings
    cut = [512] * 64 if captions is None else even_lengths(captions, 512, 64)
    lengths = [*(min(256, length) for length in cut), *(length for length in cut if length > 256)]
    assert encoding.flops == pytest.approx(sum(map(PAPER.text.flops, lengths)) / 64)
    traffic = sum(map(PAPER.text.traffic_bytes, lengths)) / 64
    assert encoding.hours == pytest.approx(1e6 * (encoding.flops / 1e14 + traffic / 1e12) / 0.5 / 4 / 3600)
    assert after.storage.text_states_gb == pytest.approx(2 * 1024 * sum(lengths) / 64 * 1e6 / 1e9)
    assert encoding.resolution is None and encoding.disk_gb == after.storage.text_states_gb
    assert after.total("rent_usd") == pytest.approx(encoding.rent_usd + sum(each.rent_usd for each in after.stages))


def test_a_stage_whose_captions_are_encoded_as_they_come_counts_them():
    stages = (replace(PAPER.stages[0], text_stored=True), *PAPER.stages[1:])
    found = forecast(replace(PAPER, stages=stages), PAPER_MACHINE)
    assert [stage.operations.text > 0 for stage in found.stages] == [False, True, True, True]
    assert found.encodings[0].flops == PAPER.text.flops(256)
    online = forecast(PAPER, PAPER_MACHINE)
    assert not online.encodings and not online.storage.text_states_gb


def test_text_states_and_latents_leave_the_encoders_nothing_to_do():
    stage = replace(PAPER.stages[0], cached=True, text_stored=True)
    assert device_memory(PAPER, stage).encoding == 0
    assert PAPER.operations(stage).total == PAPER.operations(stage).network


@pytest.mark.parametrize("devices", [1, 4])
def test_overlapped_encoders_take_their_memory_beside_the_network_s(devices):
    """And the inputs of the micro-batch that is encoded ahead."""
    overlapped = replace(PAPER, overlapped=True)
    for stage in (PAPER.stages[0], replace(PAPER.stages[0], batch_size=32, micro_batch_size=32)):
        apart, together = (device_memory(recipe, stage, devices=devices) for recipe in (PAPER, overlapped))
        assert together.fixed == apart.fixed and apart.activations > apart.encoding > 0
        assert apart.inputs + apart.activations > apart.gradients
        assert together.total - apart.total == apart.inputs + apart.encoding
    assert largest_micro_batch(overlapped, PAPER.stages[0], 24) < largest_micro_batch(PAPER, PAPER.stages[0], 24)


def test_a_budget_pays_for_the_encoding_first():
    stages = tuple(replace(stage, cached=stage.resolution < 600) for stage in PAPER.stages)
    recipe = replace(PAPER, stages=stages)
    encoding = sum(each.rent_usd for each in forecast(recipe, PAPER_MACHINE).encodings)
    proposal = propose(recipe, PAPER_MACHINE, 300)
    assert 297 < proposal.forecast.total("rent_usd") <= 300
    assert proposal.share == pytest.approx(
        (300 - encoding) / (forecast(recipe, PAPER_MACHINE).total("rent_usd") - encoding)
    )
    with pytest.raises(UserError, match="below the smallest schedule"):
        propose(recipe, PAPER_MACHINE, 0.9 * forecast(recipe, PAPER_MACHINE).encodings[0].rent_usd)


@pytest.mark.parametrize("captions", [64.0, [8, 30, 60, 90, 300]])
def test_useful_work_is_that_of_captions_without_padding(captions):
    """The mean over captions drawn one by one, each counted alone with the tokens that it has."""
    recipe = replace(PAPER, dataset=Dataset(caption_tokens=captions), text_lengths="bucketed")
    random = np.random.default_rng(0)
    drawn = (
        random.lognormal(np.log(64) - SPREAD**2 / 2, SPREAD, size=4000)
        if captions == 64.0
        else np.interp(random.random(4000), np.linspace(0, 1, 5), captions)
    )
    for stage in forecast(recipe, PAPER_MACHINE).stages:
        side, lengths = stage.stage.resolution // 8, np.clip(drawn.round().astype(int), 1, stage.stage.context_length)
        counted = [
            training_flops(recipe.network, (side, side), int(each), stage.stage.routing_rate) for each in lengths
        ]
        assert stage.useful_flops == pytest.approx(np.mean(counted), rel=0.01)
        assert stage.useful_flops < stage.operations.model
        assert stage.mfu == pytest.approx(stage.useful_flops * stage.images_per_s / (4 * 209.5e12))
        assert stage.padding_share == pytest.approx(1 - lengths.mean() / stage.text_tokens, abs=0.03)


def smallest_cost_usd(recipe, machine):
    return forecast(smallest(recipe), machine).total("rent_usd")


def test_caching_the_paper_s_set_takes_more_than_ten_terabytes():
    assert 10_000 < forecast(PAPER, PAPER_MACHINE).storage.cache_gb < 13_000  # the paper: more than 12 TB


def test_units_of_time_energy_and_money():
    stage = forecast(PAPER, PAPER_MACHINE).stages[1]
    assert stage.hours == pytest.approx(stage.stage.steps * stage.step.total / 3600)
    assert stage.images_per_s == pytest.approx(512 / stage.step.total)
    assert stage.device_hours == pytest.approx(4 * stage.hours)
    assert stage.rent_usd == pytest.approx(stage.hours * 4 * 0.375)
    assert stage.kwh == pytest.approx(stage.hours * (4 * 575 * 0.9 + 250) / 1000)
    assert stage.electricity_usd == pytest.approx(0.30 * stage.kwh)
    assert stage.read_mb_s == pytest.approx(stage.images_per_s * 0.25)
    assert stage.tokens == 42_345_000 * (1024 + 256)
    assert (stage.image_tokens, stage.kept_tokens) == (1024, 512)
    assert stage.mfu == pytest.approx(3 * stage.operations.forward * stage.images_per_s / (4 * 209.5e12))


def test_seconds_of_a_step_by_hand():
    stage, machine = PAPER.stages[1], Machine(replace(GPUS["5090"], peak_tflops=100.0, bandwidth_gb_s=1000.0), 2)
    step, count = step_time(PAPER, stage, machine, 64, utilisation=0.5), PAPER.operations(stage)
    assert step.network == pytest.approx(256 * count.network / 1e14)
    assert step.autoencoder == pytest.approx(256 * count.autoencoder / 1e14)
    assert step.text == pytest.approx(256 * count.text / 1e14)
    assert step.optimizer == pytest.approx(343_176_208 * (40 + 12) / 1e12)
    assert step.device == pytest.approx(2 * step.ideal)  # the exchange hides behind a backward pass of seconds
    ideal = step.network + step.autoencoder + step.text + step.between + step.optimizer
    assert step.ideal == pytest.approx(ideal)


def test_gradient_exchange_by_hand():
    assert exchange_seconds(PAPER, GPUS["5090"], 1) == 0
    assert exchange_seconds(PAPER, GPUS["5090"], 4) == pytest.approx(2 * 3 / 4 * 4 * 343_176_208 / 25e9)
    half = replace(PAPER, half_gradients=True)
    assert exchange_seconds(half, GPUS["5090"], 4) == pytest.approx(exchange_seconds(PAPER, GPUS["5090"], 4) / 2)
    slow = Machine(replace(GPUS["5090"], link_gb_s=0.05), 4)
    assert forecast(PAPER, slow).stages[0].binds == "gradient exchange"


def test_a_slow_host_binds():
    machine = Machine(GPUS["h100"], 4, Host(cores=2, decode_mpx_per_core_s=40))
    stage = forecast(PAPER, machine).stages[0]
    assert stage.binds == "data"
    assert stage.images_per_s == pytest.approx(2 * 40 / 2.0)
    disk = Machine(GPUS["h100"], 4, Host(cores=1000, disk_mb_s=5))
    assert forecast(PAPER, disk).stages[0].images_per_s == pytest.approx(5e3 / 250)


def test_a_device_of_little_bandwidth_is_bound_by_it():
    machine = Machine(replace(GPUS["5090"], bandwidth_gb_s=100.0), 4)
    assert forecast(PAPER, machine).stages[0].binds == "memory bandwidth"


def test_operations_of_attention_by_hand():
    work = PAPER.work(PAPER.stages[3])
    assert attention_score_flops(PAPER.network, work) == 2 * 1024 * 24 * (4096 + 512) ** 2  # 20 blocks, 4 of them twice


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_micro_batch_is_the_last_that_fits(checkpointing):
    stage = replace(PAPER.stages[1], checkpointing=checkpointing)
    largest = largest_micro_batch(PAPER, stage, 24, devices=4, reserve_gib=1.5)
    frugal = replace(PAPER, text_max_tokens=1, autoencoder_max_pixels=1)

    def peak(samples):
        return device_memory(frugal, replace(stage, micro_batch_size=samples), devices=4, reserve_gib=1.5).total

    assert peak(largest) <= 24 * GIB < peak(largest + 1)


def test_a_micro_batch_is_at_most_the_batch_however_much_memory_there_is():
    small = replace(PAPER.stages[0], resolution=64)
    assert [largest_micro_batch(PAPER, replace(small, batch_size=n), 10_000) for n in (1, 2, 511, 512)] == [
        1,
        2,
        511,
        512,
    ]


def test_checkpointing_fits_more_and_less_memory_fits_less():
    for plan in (forecast(PAPER, Machine(GPUS[name], 4)) for name in ("3090", "5090")):
        for stage in plan.stages:
            assert stage.largest_checkpointed > 4 * stage.largest_plain > 0
            assert stage.stage.batch_size % (4 * stage.micro_batch) == 0
    small, large = (forecast(PAPER, Machine(GPUS[name], 4)).stages[0] for name in ("3090", "5090"))
    assert small.largest_plain < large.largest_plain


def test_usable_micro_batches_divide_the_share_of_a_device():
    stage = PAPER.stages[0]
    assert usable_micro_batch(stage, 4, 100) == 64
    assert usable_micro_batch(stage, 4, 10_000) == 512
    assert usable_micro_batch(stage, 4, 0) == 0
    assert usable_micro_batch(replace(stage, batch_size=30), 2, 4) == 3


def test_encoder_batches_shrink_until_the_stage_fits():
    stage = PAPER.stages[2]
    unlimited = replace(PAPER, autoencoder_max_pixels=10**9)
    assert fitting_encoder_batches(unlimited, stage, 99, devices=4) == (64, 64)
    text, images = fitting_encoder_batches(unlimited, stage, 24, devices=4, reserve_gib=1.5)
    assert text == 64

    def peak(pictures):
        fitted = replace(unlimited, autoencoder_max_pixels=pictures * 768**2)
        return device_memory(fitted, stage, devices=4, reserve_gib=1.5).total

    assert peak(images) <= 24 * GIB < peak(images + 1)
    notes = forecast(unlimited, Machine(GPUS["4090"], 4)).stages[2].notes
    assert f"set vae.max_pixels={images * 768**2} so that the encoder's own activations fit" in notes


@pytest.mark.parametrize(("resolution", "together"), [(256, 83), (512, 20), (768, 9), (1024, 5), (4096, 1)])
def test_images_at_once_take_the_same_memory_at_every_resolution(resolution, together):
    stage = replace(PAPER.stages[0], resolution=resolution, micro_batch_size=128)
    assert PAPER.images_at_once(stage) == together
    encoder = together * PAPER.autoencoder.encode_peak_bytes(resolution, resolution)
    inputs = 128 * 3 * 4 * resolution**2
    assert device_memory(PAPER, stage).encoding == encoder + inputs
    assert resolution > 1024 or 6.2 < encoder / GIB < 6.6


@pytest.mark.parametrize(("context", "together"), [(32, 2048), (256, 256), (512, 128), (100_000, 1)])
def test_captions_at_once_have_so_many_tokens_together(context, together):
    assert PAPER.captions_at_once(replace(PAPER.stages[0], context_length=context)) == together


def test_notes_say_what_to_set():
    too_many = replace(PAPER, stages=(replace(PAPER.stages[0], micro_batch_size=128), *PAPER.stages[1:]))
    stages = forecast(too_many, PAPER_MACHINE).stages
    assert not stages[0].fits
    assert any("schedule.stages.px256.micro_batch_size=32" in note for note in stages[0].notes)
    assert not stages[1].notes
    assert "activation_checkpointing=false" in stages[1].savings[0]
    assert not stages[0].savings
    nothing = forecast(PAPER, Machine(replace(GPUS["5090"], memory_gib=4), 4)).stages[0]
    assert nothing.micro_batch == 0
    assert nothing.binds == "memory (does not fit)"
    assert "not even one sample" in nothing.notes[0]


def test_gradients_stay_with_accumulation_or_several_devices():
    stage = replace(PAPER.stages[0], batch_size=8, micro_batch_size=8)
    alone = device_memory(PAPER, stage)
    assert device_memory(PAPER, stage, devices=2).fixed - alone.fixed == alone.gradients
    assert device_memory(PAPER, replace(stage, batch_size=16)).fixed - alone.fixed == alone.gradients


def test_a_sharded_device_holds_its_part_and_what_is_gathered():
    stage, sharded = PAPER.stages[0], replace(PAPER, sharded=True)
    whole, part = (device_memory(recipe, stage, devices=4) for recipe in (PAPER, sharded))
    for kept in ("weights", "gradients", "optimizer", "averages"):
        assert getattr(part, kept) == pytest.approx(getattr(whole, kept) / 4, rel=1e-6)
    with torch.device("meta"):
        network = XUT(PAPER.network)
    blocks = sorted(sum(each.numel() for each in block.parameters()) for block in network.blocks())
    conditioning = sum(each.numel() for each in network.modulation.parameters())
    rest = 343_176_208 - sum(blocks) - conditioning
    assert part.half_copies == pytest.approx(2 * (2 * blocks[-1] + conditioning) + 4 * rest, rel=0.05)
    assert (part.activations, part.encoders) == (whole.activations, whole.encoders)


def test_a_sharded_network_is_exchanged_with_every_micro_batch():
    sharded, slow = replace(PAPER, sharded=True), Machine(replace(GPUS["5090"], link_gb_s=0.05), 4)
    seconds = exchange_seconds(sharded, slow.gpu, 4)
    assert seconds == pytest.approx(3 / 4 * (2 + 2 + 4) * 343_176_208 / 0.05e9)
    stage = PAPER.stages[1]
    steps = [step_time(sharded, stage, slow, micro_batch, utilisation=0.5) for micro_batch in (64, 32)]
    hidden = 64 * sharded.operations(stage).network / (slow.gpu.peak_tflops * 1e12) / 0.5
    assert steps[0].exchange == pytest.approx(2 * (seconds - hidden))
    assert steps[1].exchange == pytest.approx(4 * (seconds - hidden / 2))
    assert steps[0].optimizer == pytest.approx(step_time(PAPER, stage, slow, 64, utilisation=0.5).optimizer / 4)


def test_bytes_exchanged_in_a_stage():
    stage, parameters = PAPER.stages[1], 343_176_208
    plain = forecast(PAPER, PAPER_MACHINE).stages[1]
    assert plain.exchange_gb == pytest.approx(stage.steps * 2 * 3 / 4 * 4 * parameters / 1e9)
    halves = replace(PAPER, stages=tuple(replace(each, micro_batch_size=16) for each in PAPER.stages), sharded=True)
    sharded = forecast(halves, PAPER_MACHINE).stages[1]
    assert sharded.micro_batch == 16  # eight micro-batches a step, each with its weights gathered twice
    assert sharded.exchange_gb == pytest.approx(stage.steps * 8 * 3 / 4 * (2 + 2 + 4) * parameters / 1e9)


def test_activations_are_told_with_and_without_checkpointing():
    for stage in forecast(PAPER, PAPER_MACHINE).stages:
        own = stage.activations_checkpointed if stage.stage.checkpointing else stage.activations_plain
        assert own == stage.memory.activations
        assert stage.activations_plain > 4 * stage.activations_checkpointed > 0


def test_a_proposal_takes_the_measured_utilisation_of_each_stage():
    measured = {"px256": 0.31, "px512": 0.62, "px768": 0.62, "px1024": 0.62}
    proposal = propose(PAPER, PAPER_MACHINE, 600, utilisation=measured)
    assert {stage.stage.name: stage.utilisation for stage in proposal.forecast.stages} == measured
    assert 594 < proposal.forecast.total("rent_usd") <= 600
    assert proposal.share < propose(PAPER, PAPER_MACHINE, 600).share
    least = smallest_cost_usd(PAPER, PAPER_MACHINE)
    with pytest.raises(UserError) as caught:
        propose(PAPER, PAPER_MACHINE, 1.5 * least, utilisation={**measured, "px512": 0.9})
    told = float(caught.value.what.rpartition("costs $")[2].split()[0])
    assert told == pytest.approx(2 * least, rel=0.01)


def test_a_budget_for_a_model_that_fits_nowhere_is_still_told():
    giant = replace(PAPER, network=replace(PAPER.network, width=65_536, heads=1024, mlp_width=196_608))
    with pytest.raises(UserError, match="below the smallest schedule") as caught:
        propose(giant, PAPER_MACHINE, 1)
    assert "gpus=" not in caught.value.hint


def test_measured_utilisation_replaces_the_assumed_one():
    plan = forecast(PAPER, PAPER_MACHINE, utilisation={"px512": 0.31})
    usual = forecast(PAPER, PAPER_MACHINE)
    assert plan.stages[1].hours == pytest.approx(2 * usual.stages[1].hours, rel=1e-3)
    assert plan.stages[0].hours == usual.stages[0].hours


def test_a_forecast_is_plain_json():
    plan = forecast(PAPER, PAPER_MACHINE)
    content = json.loads(json.dumps(plan.to_json()))
    assert content["machine"]["name"] == "4x5090"
    assert content["total"]["hours"] == pytest.approx(plan.total("hours"))
    assert [stage["stage"]["name"] for stage in content["stages"]] == ["px256", "px512", "px768", "px1024"]
    assert content["stages"][0]["memory"]["total"] == plan.stages[0].memory.total


@pytest.mark.parametrize("budget", [1200, 600, 200])
def test_a_proposal_spends_the_budget_and_no_more(budget):
    proposal = propose(PAPER, PAPER_MACHINE, budget)
    assert 0.99 * budget < proposal.forecast.total("rent_usd") <= budget
    assert not proposal.dropped
    before = forecast(PAPER, PAPER_MACHINE).total("rent_usd")
    assert proposal.share == pytest.approx(budget / before)
    assert f"schedule.stages.px256.samples={proposal.forecast.stages[0].stage.samples}" in proposal.overrides


def test_a_small_budget_drops_the_highest_resolutions():
    proposal = propose(PAPER, PAPER_MACHINE, 50)
    names = [stage.stage.name for stage in proposal.forecast.stages]
    assert names == ["px256", "px512"][: len(names)]
    assert proposal.dropped[-1] == "px1024"
    assert "~schedule.stages.px1024" in proposal.overrides
    for stage in proposal.forecast.stages:
        assert stage.stage.samples >= least_samples(stage.stage)


def test_a_budget_below_the_smallest_schedule():
    least = smallest_cost_usd(PAPER, PAPER_MACHINE)
    assert propose(PAPER, PAPER_MACHINE, int(least) + 1).forecast.total("rent_usd") <= int(least) + 1
    with pytest.raises(UserError) as caught:
        propose(PAPER, PAPER_MACHINE, 0.5 * least)
    assert caught.value.where == "budget_usd"
    assert f"${least:.2f}" in caught.value.what
    assert f"budget_usd={int(least) + 1}" in caught.value.hint
    assert "gpus=1x" in caught.value.hint


def test_a_budget_needs_a_price():
    free = Machine(replace(GPUS["4090"], usd_per_hour=0.0), 1)
    with pytest.raises(UserError, match="no price"):
        propose(PAPER, free, 100)
