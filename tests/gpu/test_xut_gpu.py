"""The network on a CUDA device: no waiting for the host, and the same velocity in mixed precision and compiled."""

import pytest
import torch

from hdm_lightning.models import XUT, XUTConfig
from hdm_lightning.models.compiled_blocks import compile_blocks
from hdm_lightning.models.routing import random_keep
from hdm_lightning.training.strategies.parallelize import prepare_network

pytestmark = pytest.mark.gpu
CONFIG = XUTConfig(width=256, mlp_width=512, heads=4, head_dim=64, context_width=64, depth=2, decoder_blocks=2)


def filled() -> XUT:
    torch.manual_seed(0)
    model = XUT(CONFIG)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.cuda()


def inputs() -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    draw = torch.Generator("cuda").manual_seed(1)
    latent = torch.randn(4, 4, 16, 16, generator=draw, device="cuda")
    t = torch.rand(4, generator=draw, device="cuda")
    context = torch.randn(4, 24, 64, generator=draw, device="cuda")
    lengths = torch.tensor([24, 3, 10, 1], device="cuda")
    return (latent, t, context), {"context_lengths": lengths, "keep": random_keep(4, 64, 0.5, draw)}


def test_forward_and_backward_do_not_wait_for_the_host() -> None:
    model, (arguments, options) = filled(), inputs()
    model(*arguments, **options).square().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(*arguments, **options).square().mean().backward()
        random_keep(4, 64, 0.5, torch.Generator("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("masked", [False, True])
def test_device_mixed_precision_and_compiled_agree_with_the_cpu(masked: bool) -> None:
    model, (arguments, options) = filled(), inputs()
    if not masked:
        options.pop("context_lengths")
    with torch.no_grad():
        expected = (
            filled()
            .cpu()
            .double()(*(a.cpu().double() for a in arguments), **{name: value.cpu() for name, value in options.items()})
        )
        plain = model(*arguments, **options)
        with torch.autocast("cuda", torch.bfloat16):
            mixed = model(*arguments, **options)
            compile_blocks(model)
            compiled = model(*arguments, **options)
    for found, tolerance in ((plain, 2e-3), (mixed, 3e-2), (compiled, 3e-2)):
        error = (found.cpu().double() - expected).norm() / expected.norm()
        assert error < tolerance, float(error)


def gradient(model: XUT, dtype: torch.dtype) -> torch.Tensor:
    arguments, options = inputs()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = model(*arguments, **options).float().square().mean()
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))])


def test_compiled_and_recomputed_gradients_are_as_good_as_those_of_eager_mode() -> None:
    model = filled()
    exact, eager = gradient(model, torch.float32), gradient(model, torch.bfloat16)
    prepare_network(model, activation_checkpointing=True, compiled=True)
    for _ in range(2):  # the second pass meets the graphs of the first
        compiled = gradient(model, torch.bfloat16)
        assert (compiled - exact).norm() <= 1.2 * (eager - exact).norm()
