"""One ComfyUI for all tests of this tier, and tiny models that only this project's nodes can read."""

import os

import pytest
import torch

from hdm_lightning import load_autoencoder
from hdm_lightning.cli import convert
from hdm_lightning.encoders.pretrained import TextEncoderSource
from hdm_lightning.generation.stored_pipeline import save_final
from hdm_lightning.interop.adapter_files import write_adapter_file, write_adapter_folder
from hdm_lightning.interop.adapter_layers import LowRank
from hdm_lightning.interop.adapters import Adapter, Base, weights_sha256
from hdm_lightning.interop.pipeline_folder import read_pipeline_folder
from hdm_lightning.models import XUT, XUTConfig
from real_comfyui import started

OWN = XUTConfig(
    channels=4, patch_size=2, width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=2, decoder_blocks=1
)
SETTINGS = {"height": 64, "width": 64, "steps": 10, "guidance_scale": 3.0, "shift": 1.6}
LAYERS = ("decoder.0.0.cross_attention.key_value", "text_projection", "modulation.feed_forward.output")


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory):
    """The server."""
    try:
        server = started(tmp_path_factory.mktemp("comfyui"))
    except LookupError as error:
        pytest.fail(str(error), pytrace=False)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def saved(tiny_text_encoder, tiny_autoencoder):
    """Function of a folder, a seed and changes of the configuration that writes a model there."""

    def write(folder, seed=0, **changes):
        torch.manual_seed(seed)
        config = XUTConfig.from_json(OWN.to_json() | changes)
        state = {name: value + 0.05 * torch.randn_like(value) for name, value in XUT(config).state_dict().items()}
        save_final(
            folder / "final",
            state,
            xut=config,
            text_encoder=TextEncoderSource(str(tiny_text_encoder), layer=-2, context_length=12),
            autoencoder=load_autoencoder(str(tiny_autoencoder), mean=[0.3, -0.2, 0.1, 0.0], std=[0.5, 0.7, 1.5, 2.0]),
            sampling=SETTINGS,
        )
        return folder

    return write


@pytest.fixture(scope="session")
def run(comfyui, saved):
    """A run's folder among ComfyUI's models, of a wiring that no published loader knows; chosen as "run"."""
    return saved(comfyui.folder / "models" / "hdm" / "run")


@pytest.fixture(scope="session")
def single(run, comfyui):
    """The same as a single file, in float32; chosen as "single.safetensors"."""
    path = comfyui.folder / "models" / "checkpoints" / "single.safetensors"
    path.parent.mkdir(exist_ok=True)
    assert convert.main([str(run), str(path), "--to", "comfyui", "--dtype", "float32"]) == 0
    return path


@pytest.fixture(scope="session")
def lora(run, comfyui):
    """Two adapters of the run among ComfyUI's: "ink", peft's folder, and "ink.safetensors", under ComfyUI's names."""
    generator = torch.Generator().manual_seed(3)
    state = XUT(OWN).state_dict()
    layers = {}
    for number, name in enumerate(LAYERS):
        (out, size), rank = state[f"{name}.weight"].shape, number + 1
        down, up = (torch.randn(shape, generator=generator) for shape in ((rank, size), (out, rank)))
        layers[name] = LowRank.of(down, 0.03 * up, 1.5 * rank)
    network = read_pipeline_folder(run / "final").load_network()
    adapter = Adapter(layers, Base(str(run), weights_sha256(network.state_dict())))
    folder = comfyui.folder / "models" / "loras"
    write_adapter_folder(folder / "ink", adapter)
    write_adapter_file(folder / "ink.safetensors", adapter, "lora_comfyui")
    return folder / "ink"


@pytest.fixture(autouse=True)
def one_thread():
    """As in the server, so that sums are in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)
