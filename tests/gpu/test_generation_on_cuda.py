"""The same seed gives the same image on the CPU and on a CUDA device, but for rounding, wherever the weights lie."""

import pytest
import torch

from hdm_lightning import HDMPipeline, load_autoencoder, load_text_encoder
from hdm_lightning.generation.sampling_settings import SamplingSettings
from hdm_lightning.models import XUT
from hdm_lightning.precision import encoder_dtype
from toy_run import CONFIG, shaken_state, write_final

PROMPTS = ["a red circle", "a star"]


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
            load_autoencoder(str(tiny_autoencoder), dtype="float32").to(device),
            text_encoder=load_text_encoder(str(tiny_text_encoder), dtype="float32").to(device),
            context_length=16,
        )
        pipeline.autocast = autocast
        return pipeline.draw(PROMPTS, [1, 2], settings)

    difference = (drawn("cpu", None).int() - drawn("cuda", autocast).int()).abs()
    assert difference.float().mean() < tolerance / 2
    assert torch.quantile(difference.float(), 0.99) <= tolerance


@pytest.fixture(scope="module")
def final(tmp_path_factory, tiny_text_encoder, tiny_autoencoder):
    return write_final(tmp_path_factory.mktemp("final"), tiny_text_encoder, tiny_autoencoder, shaken_state())


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["to", "model", "sequential"])
def test_moved_and_offloaded_pipelines_draw_what_the_cpu_draws(final, how):
    settings = SamplingSettings(height=32, width=48, steps=4, guidance_scale=2.0, conditional_rate=0.25)
    expected = HDMPipeline.from_pretrained(final).draw(PROMPTS, [1, 2], settings)
    pipeline = HDMPipeline.from_pretrained(final)
    if how == "to":
        pipeline.to("cuda")
    else:
        pytest.importorskip("accelerate")
        getattr(pipeline, f"enable_{how}_cpu_offload")()
    for _ in range(2):  # hooks are put back after each call
        difference = (pipeline.draw(PROMPTS, [1, 2], settings).int() - expected.int()).abs()
        assert difference.float().mean() < 1 and torch.quantile(difference.float(), 0.99) <= 2
    images = pipeline(PROMPTS, seed=[1, 2], height=32, width=48, output_type="pt").images
    assert images.shape == (2, 3, 32, 48)


@pytest.mark.gpu
def test_encoders_take_the_dtype_that_suits_the_card(tiny_text_encoder, tiny_autoencoder):
    text, vae = load_text_encoder(str(tiny_text_encoder)), load_autoencoder(str(tiny_autoencoder))
    assert text.dtype == vae.dtype == torch.float32
    text.to("cuda"), vae.to("cuda")
    assert text.dtype == vae.dtype == encoder_dtype(torch.device("cuda"))
    image = torch.rand(1, 3, 16, 16, device="cuda")
    assert vae.encode(image).dtype == torch.float32 and vae.encode(image).device.type == "cuda"
