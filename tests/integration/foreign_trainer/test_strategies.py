"""Strategies by name in a plain Trainer on two processes, against plain DDP."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from hdm_lightning.errors import UserError
from hdm_lightning.training.callbacks.weight_averages import WeightAverages
from hdm_lightning.training.strategies import own_strategies  # noqa: F401 (Lightning learns their names)
from hdm_lightning.training.strategies.sharded_tensors import is_sharded


@pytest.fixture
def on_two(flow_module, shard_data, trainer, on_processes, tmp_path):
    """Function of a strategy that fits, saves, and gives the first process's weights, losses and kind of network."""

    def run(strategy, name, ckpt=None, **changes):
        def fit(**processes):
            module, averages = flow_module(), WeightAverages([16], ramp=0.0)
            settings = {**processes, "strategy": strategy, "callbacks": [averages], **changes}
            each = trainer(**settings)
            each.fit(module, shard_data(2), ckpt_path=ckpt)
            each.save_checkpoint(tmp_path / name)
            losses = {key: float(value) for key, value in each.callback_metrics.items() if key.startswith("val/")}
            return losses, is_sharded(module.network)

        found = on_processes(2, fit)
        assert found[0] == found[1]
        return found[0]

    return run


def saved(path):
    checkpoint = torch.load(path, weights_only=True)
    average = checkpoint["callbacks"]["WeightAverages"]["shadows"][0]
    moments = [state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()]
    return [*checkpoint["state_dict"].values(), *average.values(), *moments]


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp_static_graph"])
def test_a_strategy_takes_the_steps_of_ddp(on_two, tmp_path, strategy):
    """Its checkpoint has whole tensors, from which DDP resumes, and it resumes from DDP's."""
    expected, _ = on_two(DDPStrategy(), "ddp.ckpt")
    found, sharded = on_two(strategy, "other.ckpt")
    assert sharded == (strategy == "fsdp2")
    assert found == pytest.approx(expected, rel=1e-3)
    for got, wanted in zip(saved(tmp_path / "other.ckpt"), saved(tmp_path / "ddp.ckpt"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    on_two(DDPStrategy(), "ddp8.ckpt", tmp_path / "ddp.ckpt", max_steps=8)
    on_two(strategy, "other8.ckpt", tmp_path / "ddp.ckpt", max_steps=8)
    on_two(DDPStrategy(), "back8.ckpt", tmp_path / "other.ckpt", max_steps=8)
    for name in ("other8.ckpt", "back8.ckpt"):
        for got, wanted in zip(saved(tmp_path / name), saved(tmp_path / "ddp8.ckpt"), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_a_network_that_it_cannot_split_is_refused(flow_module, shard_data, trainer):
    class Foreign(torch.nn.Linear):
        config = None

    module = flow_module(Foreign(1, 1), patch_size=1, rule="constant")
    with pytest.raises(UserError, match="XUT"):
        trainer(strategy="fsdp2").fit(module, shard_data())
