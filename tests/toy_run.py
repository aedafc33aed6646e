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


def random_network(config, seed=0, std=0.3):
    """A network whose parameters are drawn from a normal distribution."""
    torch.manual_seed(seed)
    network = XUT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std)
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


def shaken_state(config=CONFIG, seed=0, by=0.02):
    """The tensors of a network of which none is at its start any more."""
    torch.manual_seed(seed)
    return {name: value + by * torch.randn_like(value) for name, value in XUT(config).state_dict().items()}


def write_final(folder, text_encoder, autoencoder, state, *, config=CONFIG, layer=-1, context_length=16, **options):
    """Write a model's folder; `raw=True` adds other last weights, and the options are those of `save_final`."""
    from hdm_lightning.encoders.autoencoder import load_autoencoder
    from hdm_lightning.encoders.pretrained import TextEncoderSource
    from hdm_lightning.generation.stored_pipeline import save_final

    if options.pop("raw", False):
        options["raw_state"] = {name: 0.9 * value for name, value in state.items()}
    source = TextEncoderSource(str(text_encoder), layer=layer, context_length=context_length)
    vae = load_autoencoder(str(autoencoder))
    return save_final(folder, state, xut=config, text_encoder=source, autoencoder=vae, **options).folder


def same_bits(found, expected):
    """Assert that tensors have the same names, types, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
