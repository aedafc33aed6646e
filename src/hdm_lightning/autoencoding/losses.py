"""The terms of an autoencoder's generator loss, each one a mean per sample.

Shapes: image (B,3,H,W) in [-1, 1]; mean and log_variance of the posterior (B,C,h,w); every term (B,).

All terms are means over their elements, so no weight depends on resolution, scale or factor. A batch's loss is the
mean over its samples, to which a masked sample adds 0: ranks need not communicate how many of these each has, and two
ranks compute exactly the loss of one process with twice the batch.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PixelLoss = Literal["l1", "l2", "huber"]

_POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda output, target: (output - target).abs(),
    "l2": lambda output, target: (output - target).square(),
    "huber": lambda output, target: F.smooth_l1_loss(output, target, reduction="none", beta=0.1),
}


def pixel_loss(output: Tensor, target: Tensor, kind: PixelLoss = "l1") -> Tensor:
    """Return the mean pointwise difference per sample (B,).

    "huber" is quadratic below a difference of 0.1 (about 13 of 255 gray levels) and linear above.
    """
    if kind not in _POINTWISE:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(_POINTWISE)}")
    return _POINTWISE[kind](output, target).flatten(1).mean(1)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) ‖ N(0, 1)) per latent element, in nats, averaged per sample (B,)."""
    per_element = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
    return per_element.flatten(1).mean(1)


def batch_mean(per_sample: Tensor, weight: Tensor) -> Tensor:
    """Return Σ weight·term / B, a scalar; a masked sample (weight 0) adds nothing."""
    return (per_sample * weight).mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return ½·(mean relu(1 − D(x)) + mean relu(1 + D(x̂))) per sample (B,), from PatchGAN logits (B,1,h,w)."""
    real = F.relu(1.0 - real_logits).flatten(1).mean(1)
    fake = F.relu(1.0 + fake_logits).flatten(1).mean(1)
    return 0.5 * (real + fake)


def generator_adversarial(fake_logits: Tensor) -> Tensor:
    """Return −D(x̂), averaged over the patches of each sample (B,)."""
    return -fake_logits.flatten(1).mean(1)


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, largest: float = 1e4) -> Tensor:
    """Return λ = clamp(‖∇rec‖ / (‖∇adv‖ + 1e-4), 0, largest), detached.

    Both gradients are with respect to the decoder's last convolution (VQGAN, arXiv 2012.09841, equation 7).
    """
    norms = torch.linalg.vector_norm(reconstruction_gradient), torch.linalg.vector_norm(adversarial_gradient)
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, largest).detach()
