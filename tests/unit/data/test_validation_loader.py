"""The validation set: finite, complete, even over the ranks, and plain."""

from dataclasses import replace

import torch

from hdm_lightning.data.captions import CaptionRules
from hdm_lightning.data.loader import ValidationLoader

SAMPLES = 150


def test_validation_is_finite_complete_even_and_plain(kit, shards):
    module = kit.data_module(shards, batch_size=4, validation_samples=37, captions=CaptionRules(drop=0.5))
    alone = [key for batch in module.val_dataloader() for key in batch["keys"]][:37]
    assert len(set(alone)) == 37
    for world, workers in [(2, 0), (3, 2), (4, 1)]:
        indices, lengths = [], []
        for rank in range(world):
            loader = ValidationLoader(
                replace(module.validation_stream, workers=workers),
                module.validation_plan,
                kit.letters,
                samples=37,
                batch_size=4,
                rank=rank,
                world=world,
            )
            held = list(loader)
            lengths.append(len(held))
            assert len(loader) == len(held)
            for batch in held:
                assert len(batch["keys"]) == 4 and batch["set_size"] == 37
                real = batch["weight"] == 1
                indices += batch["index"][real].tolist()
                assert all(
                    caption.startswith("number") for caption, good in zip(batch["captions"], real, strict=True) if good
                )
                assert batch["lengths"].min() >= 1
        assert len(set(lengths)) == 1
        assert sorted(indices) == list(range(37))
    everything = kit.data_module(shards, batch_size=32, validation_samples=10**6)
    weights = torch.cat([batch["weight"] for batch in everything.val_dataloader()])
    assert weights.sum() == SAMPLES
    assert {batch["set_size"] for batch in everything.val_dataloader()} == {SAMPLES}
    assert kit.data_module(shards, batch_size=4, validation_samples=0).val_dataloader() == []


def test_validation_crops_are_centred(kit, tmp_path):
    folder = kit.write_shards(tmp_path, [9], width=40, height=16)
    module = kit.data_module(folder, batch_size=9, validation_samples=9)
    (batch,) = module.val_dataloader()
    assert batch["crop"].tolist() == [[0, 12, 16, 40]] * 9
