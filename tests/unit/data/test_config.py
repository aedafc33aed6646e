"""Values that cannot be meant are refused with the name of their key."""

from dataclasses import fields

import pytest

from hdm_lightning.data.captions import CaptionRules, TagGrammar
from hdm_lightning.data.crops import Buckets, CropRules
from hdm_lightning.data.rules import Source, rules_from
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.errors import UserError
from mutations import ODD


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda kit: kit.stream_config("x", resolution=0), "data.resolution"),
        (lambda kit: kit.stream_config("x", context_length=0), "data.context_length"),
        (lambda kit: kit.stream_config("x", lanes=0), "data.lanes"),
        (lambda kit: kit.stream_config("x", window=-1), "data.window"),
        (lambda kit: kit.stream_config("x", workers=-1), "data.workers"),
        (lambda kit: kit.stream_config("x", max_bad_share=1.5), "data.max_bad_share"),
        (lambda kit: kit.stream_config("x", cache_gb=float("nan")), "data.cache_gb"),
        (lambda kit: kit.stream_config("x", memory_cache_gb=-1.0), "data.memory_cache_gb"),
        (lambda kit: CaptionRules(prefer="yaml"), "data.captions.prefer"),
        (lambda kit: CaptionRules(drop=-0.1), "data.captions.drop"),
        (lambda kit: TagGrammar(tag=""), "data.captions.tags"),
        (lambda kit: TagGrammar(tag_drop=2), "data.captions.tags.tag_drop"),
        (lambda kit: CropRules(max_aspect=0.5), "data.crop.max_aspect"),
        (lambda kit: CropRules(max_upscale=-1), "data.crop.max_upscale"),
        (lambda kit: CropRules(max_upscale=0), "data.crop.max_upscale"),
        (lambda kit: Buckets(step_px=0), "data.crop.buckets.step_px"),
        (lambda kit: Buckets(max_aspect=0.5), "data.crop.buckets.max_aspect"),
        (lambda kit: Buckets(block=0), "data.crop.buckets.block"),
        (lambda kit: Plan(kit.stream_config("shards/{000..099.tar")), "shards/{000..099.tar"),
    ],
)
def test_impossible_values_are_refused(kit, make, key):
    with pytest.raises(UserError) as caught:
        make(kit)
    assert caught.value.where == key and caught.value.hint


def test_a_lone_address_is_one_address():
    assert Source("/my/shards").urls == ("/my/shards",)


def test_odd_values_of_captions_and_crops_are_refused_with_their_key_or_make_rules_that_can_be_kept():
    """Every field, of every kind of value that YAML has; rules are keys of plans, so that they must have a hash."""
    groups = {CaptionRules: "data.captions", TagGrammar: "data.captions.tags", CropRules: "data.crop"}
    odd = [*ODD, {1: 1}, {"txt": 0.5, "long": 0.5}, {"txt": 10**400}, {"txt": "1"}, {"txt": {"a": 1}}, ["txt"], "txt"]
    made = refused = 0
    for kind, where in groups.items():
        for name, value in ((each.name, value) for each in fields(kind) for value in odd):
            try:
                hash(rules_from({name: value}, kind, where))
                made += 1
            except UserError as error:
                assert error.where.startswith(where) and error.hint, (name, value)
                refused += 1
    assert made > 40 and refused > 200


@pytest.mark.parametrize("kinds", [{"txt": "abc"}, {"txt": None}, {"txt": [1]}, {"txt": 10**400}, {"txt": True}, "txt"])
def test_python_code_is_told_of_odd_kinds_as_a_configuration_is(kinds):
    with pytest.raises(UserError) as caught:
        CaptionRules(kinds=kinds)
    assert caught.value.where.startswith("data.captions.kinds")


def test_a_training_draws_captions_by_their_kinds(kit, shards):
    data = kit.data_module(shards, batch_size=4, validation_samples=2, captions={"kinds": {"txt": 1, "long": 2}})
    data.prepare()
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 16, 16)
    assert data.training_stream.captions.kinds == {"txt": 1.0, "long": 2.0}
