"""A loss that is masked by pictures' alpha, in a plain `lightning.Trainer`."""

import torch


def test_pictures_without_alpha_train_as_ever_and_masked_parts_give_no_gradient(flow_module, shard_data, trainer):
    white, masked = flow_module(), flow_module()
    for module, alpha in ((white, "white"), (masked, "mask")):
        trainer(max_steps=2, limit_val_batches=0).fit(module, shard_data(alpha=alpha))
    pairs = zip(white.network.parameters(), masked.network.parameters(), strict=True)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in pairs)


def test_what_is_masked_does_not_count(flow_module, shard_data):
    module, data = flow_module(), shard_data(alpha="mask")
    data.prepare()
    batch = next(iter(data.val_dataloader()))
    batch["image"][:, 3, :, 8:] = 0
    drawn = module.with_draws(batch, validation=True)
    before = module.validation_losses(drawn)
    velocity = module.network.forward
    right = torch.zeros(1, 1, 4, 4)
    right[..., 2:] = 100.0
    module.network.forward = lambda *given, **named: velocity(*given, **named) + right
    assert torch.equal(module.validation_losses(drawn), before)
    assert not torch.allclose(module.validation_losses({**drawn, "image": batch["image"][:, :3]}), before)
