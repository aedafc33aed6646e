"""Micro-batches of captions of near lengths: the samples of a step stay, few lengths occur, and nobody waits long."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hdm_lightning.data.caption_lengths import SORTED_BYTES, batches_sorted_together, padded_lengths
from hdm_lightning.data.loader import StreamLoader, by_length
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import Sample
from hdm_lightning.errors import UserError

LENGTHS = (8, 12, 24)


@pytest.mark.parametrize(
    ("wanted", "context", "accelerated", "expected"),
    [
        ("auto", 256, False, ()),
        ("padded", 256, True, ()),
        ("auto", 256, True, (32, 64, 96, 128, 192, 256)),
        ("bucketed", 100, False, (32, 64, 96, 100)),
        ([96, 32, 300], 256, False, (32, 96, 256)),
        ("bucketed", 16, True, (16,)),
    ],
)
def test_lengths_rise_to_the_context(wanted, context, accelerated, expected):
    assert padded_lengths(wanted, context, accelerated=accelerated) == expected


@pytest.mark.parametrize("wrong", ["sorted", [0, 4], [2.5]])
def test_what_is_no_length_is_named(kit, shards, wrong):
    with pytest.raises(UserError, match=r"data\.text_lengths"):
        kit.data_module(shards, batch_size=4, text_lengths=wrong)


@pytest.mark.parametrize(
    ("accumulation", "batch_bytes", "expected"),
    [(16, 1, 16), (1, 1, 1), (6, SORTED_BYTES // 4, 3), (5, SORTED_BYTES // 4, 1), (4, 2 * SORTED_BYTES, 1)],
)
def test_what_is_sorted_together_divides_the_step_and_has_room(accumulation, batch_bytes, expected):
    assert batches_sorted_together(accumulation, batch_bytes) == expected


def samples_of(preparation_length):
    """Endless samples whose captions have the lengths of a function of the position; notes how many were taken."""
    taken = []

    def endless():
        index = 0
        while True:
            taken.append(index)
            image = np.zeros((3, 2, 2), dtype=np.uint8)
            yield Sample(index, str(index), image, (0, 0, 2, 2), [1] * 24, preparation_length(index), "")
            index += 1

    return endless(), taken


def test_a_group_goes_to_its_batches_by_length_and_the_next_is_read_meanwhile():
    stream, taken = samples_of(lambda index: 1 + (7 * index) % 24)
    batches = by_length(stream, 4, 3)
    for group in range(3):
        indices, lengths = [], []
        for number in range(3):
            batch = next(batches)
            assert len(taken) == 12 * (group + 1) + 4 * number
            indices += [sample.index for sample in batch]
            lengths += [sample.length for sample in batch]
        assert sorted(indices) == list(range(12 * group, 12 * group + 12))
        assert lengths == sorted(lengths, reverse=True)


def test_alone_a_batch_keeps_the_order():
    stream, taken = samples_of(lambda index: 24 - index % 24)
    batches = by_length(stream, 4, 1)
    assert [sample.index for sample in next(batches)] == [0, 1, 2, 3] and len(taken) == 4


@pytest.fixture(scope="module")
def config(kit, tmp_path_factory):
    """The stream of samples whose captions have from 2 letters to more than the 24 places that there are."""
    folder = tmp_path_factory.mktemp("captions")
    entries = [entry for number in range(48) for entry in written(kit, number)]
    kit.indexed(folder / "000.tar", entries)
    return kit.stream_config(folder)


def written(kit, number):
    text = "x" * (2 + (7 * number) % 40)
    return [(f"{number:06d}.png", kit.coloured(number)), (f"{number:06d}.txt", text.encode())]


def loader(kit, config, workers=0, **options):
    config = replace(config, workers=workers)
    return iter(StreamLoader(config, Plan(config), kit.letters, batch_size=4, **options))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_has_its_samples_and_only_its_rows_move(kit, config, world, workers):
    """Also of a stream that begins elsewhere: what is sorted are the positions of a step after the start."""
    for rank in range(world):
        options = {"rank": rank, "world": world, "start": 24}
        plain = loader(kit, config, **options)
        by = loader(kit, config, workers, lengths=LENGTHS, together=3, **options)
        for step in range(2):
            rows, found = {}, {}
            for _ in range(3):
                rows |= rows_of(next(plain))
            for batch in (next(by) for _ in range(3)):
                assert batch["tokens"].shape[1] == next(n for n in LENGTHS if n >= batch["lengths"].max())
                found |= rows_of(batch)
            first = 24 + 12 * world * step
            assert sorted(found) == sorted(rows) == list(range(first + rank, first + 12 * world, world))
            for index, row in rows.items():
                assert found[index][:2] == row[:2] and torch.equal(found[index][2], row[2])


def rows_of(batch):
    """Caption, true tokens and image of each position."""
    lengths, tokens = batch["lengths"].tolist(), batch["tokens"].tolist()
    columns = zip(batch["index"].tolist(), batch["captions"], tokens, lengths, batch["image"], strict=True)
    return {index: (caption, row[:length], image) for index, caption, row, length, image in columns}


def test_only_a_batch_without_any_padding_says_so(kit, config):
    by, found = loader(kit, config, lengths=(4, 24), together=6), set()
    for batch in (next(by) for _ in range(12)):
        found.add(batch["text_is_full"])
        assert batch["text_is_full"] == bool((batch["lengths"] == 24).all())
    assert found == {False, True}
    assert "text_is_full" not in next(loader(kit, config))
