"""A network, a stage and a run at toy size, which many tests share; they fit the tiny parts of conftest.py."""

import torch

from hdm_lightning.models import XUT, XUTConfig

MODEL = {
    "channels": 4,
    "patch_size": 1,
    "width": 32,
    "mlp_width": 48,
    "heads": 2,
    "head_dim": 16,
    "context_width": 16,
    "depth": 1,
    "decoder_blocks": 1,
}
CONFIG = XUTConfig(**MODEL)
STAGE = {
    "resolution": 16,
    "samples": 48,
    "batch_size": 8,
    "micro_batch_size": 4,
    "learning_rate": 0.2,
    "routing_rate": 0.5,
    "context_length": 8,
    "validate_every": 24,
    "save_every": 16,
    "warmup_samples": 16,
}


def run_config(folder, text_encoder, autoencoder, shards, stages, **changes):
    """The configuration of a run as it is typed; stages are name to changes of `STAGE`."""
    return {
        "name": "toy",
        "run_dir": str(folder),
        "model": {**MODEL, "blocks_after": 1},
        "text_encoder": {"name": str(text_encoder)},
        "vae": {"name": str(autoencoder)},
        "data": {"train": str(shards), "num_workers": 0, "lanes": 4, "window": 4},
        "validation": {"samples": 8, "batch_size": 4},
        "trainer": {"accelerator": "cpu", "log_every_n_steps": 2},
        "hardware": {"threads": 1},
        "callbacks": {"progress": None, "weight_averages": {"halflife_samples": [16, 64]}},
        "schedule": {"stages": {name: {**STAGE, **own} for name, own in stages.items()}},
        **changes,
    }


@torch.no_grad()
def shaken_network(config=CONFIG, seed=0, by=0.05):
    """A network of which no part is at its start any more, such as an output of zeros."""
    torch.manual_seed(seed)
    network = XUT(config)
    for parameter in network.parameters():
        parameter.add_(by * torch.randn_like(parameter))
    return network


@torch.no_grad()
def filled_network(config):
    """A network in float64 every part of which does its work."""
    torch.manual_seed(0)
    network = XUT(config)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.double()
