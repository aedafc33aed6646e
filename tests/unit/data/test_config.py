"""Values that cannot be meant are refused with the name of their key."""

import pytest

from hdm_lightning.data.captions import CaptionRules, TagGrammar
from hdm_lightning.data.crops import Buckets, CropRules
from hdm_lightning.data.rules import Source
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.errors import UserError


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda kit: kit.stream_config("x", resolution=0), "data.resolution"),
        (lambda kit: kit.stream_config("x", context_length=0), "data.context_length"),
        (lambda kit: kit.stream_config("x", lanes=0), "data.lanes"),
        (lambda kit: kit.stream_config("x", window=-1), "data.window"),
        (lambda kit: kit.stream_config("x", workers=-1), "data.workers"),
        (lambda kit: kit.stream_config("x", max_bad_share=1.5), "data.max_bad_share"),
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
