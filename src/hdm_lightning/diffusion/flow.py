"""The flow-matching path between an image and noise, its training times and its loss (arXiv 2210.02747).

Shapes: x, noise, prediction, target (B, C, H, W); t, uniform (B,).  t = 1 is noise, t = 0 is the image.
"""

import torch
from torch import Tensor


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t = t·noise + (1 − t)·x, the points at times t (B,) in [0, 1] on straight paths from image to noise.

    Raises:
        ValueError: the shapes do not match.
    """
    _require_same_shape("noise", noise, "x", x)
    if t.shape != x.shape[:1]:
        raise ValueError(f"t: got shape {tuple(t.shape)}, expected one time per sample {tuple(x.shape[:1])}")
    return torch.lerp(x, noise, t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)))


def velocity_target(x: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity dx_t/dt = noise − x that the network learns; it is the same at every t."""
    _require_same_shape("noise", noise, "x", x)
    return noise - x


def logit_normal_times(uniform: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return logit-normal training times t = sigmoid(mean + std·Φ⁻¹(u)) (arXiv 2403.03206, section 3.1).

    Args:
        uniform: numbers in [0, 1), any shape; drawn by the caller, so they can be stratified.
        mean: above 0 favors noisier times.
        std: spread before the sigmoid, at least 0.

    Returns:
        Times strictly inside (0, 1), in the shape and dtype of `uniform`.
    """
    if std < 0:
        raise ValueError(f"std: got {std}, expected at least 0")
    edge = torch.finfo(uniform.dtype).eps
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform.clamp(edge, 1.0 - edge)))


def stratified_uniforms(u: Tensor, stratum: Tensor, strata: int) -> Tensor:
    """Return stratified uniforms (stratum + u) / strata: `u` moved into its interval of [0, 1).

    A batch with one sample in each stratum 0 … strata − 1 covers [0, 1) evenly, which lowers the variance of
    a step's loss; each draw on its own stays uniform if its stratum is uniform.

    Args:
        u: numbers in [0, 1).
        stratum: integers in [0, strata), same shape as `u`.
        strata: number of equal intervals, at least 1.
    """
    if strata < 1:
        raise ValueError(f"strata: got {strata}, expected at least 1")
    _require_same_shape("stratum", stratum, "u", u)
    spread = (stratum.to(u.dtype) + u) / strata
    return spread.clamp(max=1.0 - torch.finfo(u.dtype).eps)


def loss_per_sample(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return each sample's mean squared error, (B, ...) -> (B,), computed in at least float32.

    With a nonnegative `weight` (B,1,H,W) it is the weighted mean over positions; 0 for a sample with no weight.
    """
    _require_same_shape("prediction", prediction, "target", target)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    errors = (prediction.to(dtype) - target.to(dtype)).square()
    if weight is None:
        return errors.flatten(1).mean(dim=1)
    weight = weight.to(dtype).expand_as(errors).flatten(1)
    return (errors.flatten(1) * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=torch.finfo(dtype).tiny)


def _require_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected the shape of {other_name}, {tuple(other.shape)}"
        )
