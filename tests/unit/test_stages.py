"""Derived numbers of a stage and the messages for stages that cannot be."""

from types import SimpleNamespace

import pytest

from hdm_lightning.errors import UserError
from hdm_lightning.training.composition import parse
from hdm_lightning.training.stages import Hardware, StageSettings, plan_stages


def stage(**changes):
    values = {"resolution": 64, "samples": 1000, "batch_size": 64, "micro_batch_size": 8, "learning_rate": 0.1}
    return parse(StageSettings, {**values, **changes}, "schedule.stages.a")


def schedule(**stages):
    return SimpleNamespace(stages=stages)


def test_accumulation_steps_and_offsets():
    first, second = plan_stages(schedule(a=stage(), b=stage(batch_size=32, micro_batch_size=16)), world_size=2)
    assert (first.accumulation, first.steps, first.samples) == (4, 16, 1024)  # 1000 / 64 rounded up
    assert (second.accumulation, second.samples_before, second.folder_name) == (1, 1024, "02-b")
    assert (first.steps_for(0), first.steps_for(1), first.steps_for(65)) == (0, 1, 2)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_samples_of_a_stage_do_not_depend_on_the_number_of_processes(world_size):
    (plan,) = plan_stages(schedule(a=stage()), world_size)
    assert plan.accumulation * 8 * world_size == 64
    assert plan.samples == 1024


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"batch_size": 61}, "schedule.stages.a.batch_size", " set schedule.stages.a.batch_size=64"),
        ({"samples": 0}, "schedule.stages.a.samples", "greater than 0"),
        ({"routing_rate": 1.0}, "schedule.stages.a.routing_rate", "less than 1"),
        ({"betas": (0.9, 1.0)}, "schedule.stages.a.betas", "less than 1"),
        ({"weight_decay": -1.0}, "schedule.stages.a.weight_decay", "greater than or equal to 0"),
    ],
)
def test_messages_name_the_key_and_what_it_takes(changes, key, words):
    with pytest.raises(UserError) as caught:
        plan_stages(schedule(a=stage(**changes)), world_size=1)
    assert caught.value.where == key
    assert words in f"{caught.value.what} {caught.value.hint}"


@pytest.mark.parametrize(("batch_size", "processes", "smaller"), [(60, 1, 6), (32, 8, 4), (40, 2, 5)])
def test_a_batch_that_cannot_be_shared_is_kept_where_a_smaller_micro_batch_divides_it(batch_size, processes, smaller):
    with pytest.raises(UserError) as caught:
        plan_stages(schedule(a=stage(batch_size=batch_size)), processes)
    assert caught.value.hint == f"set schedule.stages.a.micro_batch_size={smaller}"
    (plan,) = plan_stages(schedule(a=stage(batch_size=batch_size, micro_batch_size=smaller)), processes)
    assert plan.accumulation * smaller * processes == batch_size


def test_a_stage_name_that_hydra_cannot_override_is_refused():
    with pytest.raises(UserError, match="must begin with a letter"):
        plan_stages(schedule(**{"256px": stage()}), world_size=1)


def test_an_empty_schedule_is_refused():
    with pytest.raises(UserError, match="no stage"):
        plan_stages(schedule(), world_size=1)


@pytest.mark.parametrize("threads", [-1, 1025, 100_000, 1 << 70])
def test_more_threads_than_a_system_starts_are_refused_where_torch_would_crash(threads):
    with pytest.raises(ValueError, match="threads"):
        Hardware(threads=threads)


@pytest.mark.parametrize("resolution", [0, -16, 16_400, 10**6, 10**30])
def test_resolutions_that_no_image_has_are_refused(resolution):
    with pytest.raises(ValueError, match="resolution"):
        StageSettings(resolution=resolution, samples=8, batch_size=8, micro_batch_size=8, learning_rate=0.1)
