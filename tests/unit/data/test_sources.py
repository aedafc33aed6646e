"""Where the stream's samples come from: several sources, their weights, limits, and data that have changed."""

import json
import time
from collections import Counter

import numpy as np
import pytest

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.crops import Buckets, CropRules
from hdm_lightning.data.rules import Source, sources_from
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import stream
from hdm_lightning.data.source_shards import expanded
from hdm_lightning.errors import UserError


def test_sources_mix_by_weight_and_each_goes_through_its_own_passes(kit, tmp_path):
    one, two = kit.write_shards(tmp_path / "one", [30, 11]), kit.write_shards(tmp_path / "two", [60])
    config = kit.stream_config(sources=(Source((str(one),), 3.0), Source((str(two),), 1.0)))
    keys = [sample.key for sample in stream(config, kit.letters, stop=960)]
    # The shards of the two folders have the same names: tell them apart by how often their keys come.
    plan = Plan(config)
    parts = [plan.locate(position).part for position in range(960)]
    assert Counter(parts) == {0: 720, 1: 240}
    seen = [[key for key, part in zip(keys, parts, strict=True) if part == number] for number in (0, 1)]
    assert set(Counter(seen[0]).values()) <= {17, 18} and len(set(seen[0])) == 41
    assert set(Counter(seen[1]).values()) == {4}
    for world in (2, 4):
        for rank in range(world):
            own = [s.key for s in stream(config, kit.letters, rank=rank, world=world, start=100, stop=400)]
            assert own == keys[100:400][(rank - 100) % world :: world]
    even = Plan(kit.stream_config(one, sources=(Source((str(one),)), Source((str(two),)))))
    assert abs(np.mean([even.locate(position).part for position in range(1010)]) - 60 / 101) < 0.02


def test_weights_must_be_given_for_all_sources_or_none(kit, shards):
    for weights in ((1.0, None), (1.0, 0.0), (-1.0, 1.0)):
        with pytest.raises(UserError, match="positive weight"):
            Plan(kit.stream_config(sources=tuple(Source((str(shards),), weight) for weight in weights)))
    with pytest.raises(UserError, match="no source"):
        Plan(kit.stream_config(sources=()))


def test_urls_may_be_folders_shards_and_brace_patterns(kit, shards):
    def keys(*urls):
        plan = Plan(kit.stream_config(sources=(Source(urls),)))
        return sorted((shard.url.rsplit("/", 1)[1], shard.samples) for part in plan.parts for shard in part.shards)

    assert keys(str(shards)) == [("000.tar", 41), ("001.tar", 7), ("002.tar", 60), ("003.tar", 1), ("004.tar", 41)]
    assert keys(f"{shards}/{{000..002}}.tar", f"{shards}/004.tar") == [
        ("000.tar", 41),
        ("001.tar", 7),
        ("002.tar", 60),
        ("004.tar", 41),
    ]
    for mistake, what in (
        ("999.tar", "no such file"),
        ("*.tar", "wildcards are not supported"),
        ("000.tar::x/001.tar", "webdataset's ::"),
    ):
        with pytest.raises(UserError, match=what):
            keys(f"{shards}/{mistake}")


@pytest.mark.parametrize(
    "pattern",
    [
        *("{0..999999999999}", "{000..999}{000..999}{000..999}", "{0..-9999999}", "{1..9000000..3}"),
        *("{" + "9" * 5000 + "..1}", "{0.." + "9" * 50 + "}", "{a,b}" * 40, "{a..z}" * 9, "{x,{0..9999999}}"),
    ],
)
def test_patterns_of_more_shards_than_any_set_has_are_refused_before_they_are_laid_out(pattern):
    begin = time.process_time()
    with pytest.raises(UserError, match="names more than 1,000,000 shards"):
        for _ in expanded(f"http://localhost/{pattern}.tar"):
            pass
    assert time.process_time() - begin < 5
    assert len(list(expanded("x/{00000..09999}{a,b}.tar"))) == 20_000
    assert len(list(expanded("{x/{000..999},y/{000..999}}.tar"))) == 2_000
    assert len(list(expanded("{0..9000000..100}.tar"))) == 90_001


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1, 1e10, 10**400, "3", True, [1]])
def test_a_source_s_weight_that_no_share_can_be_of_is_named(weight):
    with pytest.raises(UserError) as caught:
        sources_from(["a", {"urls": "b", "weight": weight}], "data.train")
    assert caught.value.where == "data.train[1].weight" and caught.value.hint


def test_a_checkpoint_notices_that_the_data_have_changed(kit, tmp_path):
    folder = kit.write_shards(tmp_path, [5, 5])

    def module(**options):
        return kit.data_module(folder, batch_size=2, **options)

    state = json.loads(json.dumps(module().state_dict()))
    module().load_state_dict(state)
    module(num_workers=3, captions=CaptionRules(drop=0.0)).load_state_dict(state)
    for change in ({"seed": 9}, {"lanes": 6}, {"crop": CropRules(buckets=Buckets(step_px=8, block=2))}):
        with pytest.raises(UserError, match="have changed"):
            module(**change).load_state_dict(state)
    with pytest.raises(UserError, match="stage 's'"):
        module(stage="other").load_state_dict(state)
    module(resolution=32).load_state_dict(state)
    crop = CropRules(buckets=Buckets(step_px=8, block=2))
    with pytest.raises(UserError, match="have changed"):
        module(crop=crop, resolution=32).load_state_dict(module(crop=crop).state_dict())
    kit.indexed(folder / "002.tar", kit.entries_of(50, 3))
    with pytest.raises(UserError, match="have changed"):
        module().load_state_dict(state)


def test_plans_of_one_process_read_an_index_once_until_it_changes(kit, tmp_path, monkeypatch):
    from hdm_lightning.data import source_shards

    folder, read = kit.write_shards(tmp_path, [5, 5]), []
    load = source_shards.load_index
    monkeypatch.setattr(source_shards, "load_index", lambda place: read.append(place) or load(place))
    first = Plan(kit.stream_config(folder, stage="a"))
    second = Plan(kit.stream_config(folder, stage="validation"))
    assert len(read) == 1 and first.parts[0].shards[0] is second.parts[0].shards[0]
    kit.indexed(folder / "002.tar", kit.entries_of(50, 3))
    assert Plan(kit.stream_config(folder)).samples == 13 and len(read) == 2
