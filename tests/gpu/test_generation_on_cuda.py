"""The same seed gives the same picture on the CPU and on a CUDA device, but for rounding."""

import pytest
import torch

from hdm_lightning.encoders.autoencoder import load_autoencoder
from hdm_lightning.encoders.text import load_text_encoder
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.generation.pipeline import HDMPipeline
from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.models import XUT, XUTConfig

CONFIG = XUTConfig(
    channels=4, patch_size=1, width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=1, decoder_blocks=1
)


@pytest.mark.gpu
@pytest.mark.parametrize(("autocast", "tolerance"), [(None, 2), (torch.bfloat16, 16)])
def test_cpu_and_cuda_draw_the_same(tiny_text_encoder, tiny_autoencoder, autocast, tolerance):
    torch.manual_seed(0)
    state = {name: value + 0.02 * torch.randn_like(value) for name, value in XUT(CONFIG).state_dict().items()}
    settings = SamplingSettings(height=32, width=48, steps=4, guidance_scale=2.0, conditional_rate=0.25)

    def drawn(device, autocast):
        model = XUT(CONFIG)
        model.load_state_dict(state)
        pipeline = HDMPipeline(
            model.to(device),
            load_text_encoder(str(tiny_text_encoder)).to(device),
            Tokenizer(str(tiny_text_encoder)).bind(16),
            load_autoencoder(str(tiny_autoencoder)).to(device),
            autocast=autocast,
        )
        return pipeline(["a red circle", "a star"], [1, 2], settings)

    difference = (drawn("cpu", None).int() - drawn("cuda", autocast).int()).abs()
    assert difference.float().mean() < tolerance / 2
    assert torch.quantile(difference.float(), 0.99) <= tolerance
