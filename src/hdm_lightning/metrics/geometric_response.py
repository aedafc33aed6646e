"""How closely images follow the requested geometry: camera shift, camera zoom, aspect ratio.

Shapes: images (B,3,H,W), uint8; grey (B,H,W).

*Camera*: an image is compared with the one generated from the same prompt and seed without the camera move.

*Stretch*: stretching an image by s in x divides its horizontal gradients by s and keeps the vertical ones. The
logarithm of their ratio therefore rises by log s; the difference from the square image of the same prompt and seed
gives s.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hdm_lightning.metrics.bootstrap import Bootstrap, Estimate

ZOOMS = 33
"""Number of candidate zooms, from the inverse of the stated zoom (a response of -1) to its cube (3)."""

_LUMA = (0.299, 0.587, 0.114)
_FLAT = 1e-4


def luminance(images: Tensor) -> Tensor:
    """Return gray levels in [0, 1], float32 (B,H,W), of uint8 images (B,3,H,W) (BT.601 weights)."""
    weights = torch.tensor(_LUMA, device=images.device).reshape(3, 1, 1)
    return (images.float() / 255.0 * weights).sum(1)


def displacement(before: Tensor, after: Tensor, *, reach: float = 0.5) -> Tensor:
    """Return how far the content moved from one image to the other, in pixels (B,2) as (down, right).

    This is the displacement within `reach` for which the overlapping parts agree best: their correlation coefficient
    times the square root of their share of the image, so a small overlap has to agree better. A parabola through the
    coefficients at the peak and next to it gives fractions of a pixel.

    Args:
        before, after: uint8 of equal shapes.
        reach: largest displacement along a side, as a share of it, below 1.

    Raises:
        ValueError: the shapes differ, or `reach` is out of range.
    """
    if before.shape != after.shape or before.dim() != 4:
        raise ValueError(f"after: got shape {tuple(after.shape)}, expected {tuple(before.shape)}, (B,3,H,W)")
    if not 0 < reach < 1:
        raise ValueError(f"reach: got {reach}, expected between 0 and 1")
    height, width = before.shape[-2:]
    coefficient = overlap_correlation(luminance(before).double(), luminance(after).double())
    rows, columns = int(reach * height), int(reach * width)
    window = coefficient.roll((rows, columns), (1, 2))[:, : 2 * rows + 1, : 2 * columns + 1]
    left_down = 1 - torch.arange(-rows, rows + 1).abs() / height
    left_right = 1 - torch.arange(-columns, columns + 1).abs() / width
    peak = (window * (left_down[:, None] * left_right).sqrt()).flatten(1).argmax(1)
    row, column = peak // window.shape[2], peak % window.shape[2]
    index = torch.arange(len(peak))
    down = row - rows + _refined(window[index, :, column], row)
    right = column - columns + _refined(window[index, row, :], column)
    return torch.stack([down, right], dim=1)


def overlap_correlation(before: Tensor, after: Tensor) -> Tensor:
    """Return the correlation coefficient of the overlap for every displacement of gray images, (B,2H,2W).

    Entry (y, x), negative ones from the end, compares `after`[i + y, j + x] with `before`[i, j] where both exist. All
    are computed at once from Fourier transforms of images, squares and masks (Padfield 2012, masked normalized
    correlation).
    """
    size = (2 * before.shape[-2], 2 * before.shape[-1])

    def transform(grey: Tensor) -> Tensor:
        return torch.fft.rfft2(grey, s=size)

    def correlate(moved: Tensor, fixed: Tensor) -> Tensor:
        return torch.fft.irfft2(moved * fixed.conj(), s=size)

    # Centering avoids cancellation in the differences below; it does not change the coefficients.
    one, other = (grey - grey.mean((1, 2), keepdim=True) for grey in (before, after))
    mask, first, second = transform(torch.ones_like(one)), transform(one), transform(other)
    count = correlate(mask, mask).clamp(min=1)
    sums = correlate(mask, first), correlate(second, mask)
    squares = correlate(mask, transform(one.square())), correlate(transform(other.square()), mask)
    shared = correlate(second, first) - sums[0] * sums[1] / count
    variance = [(square - total.square() / count).clamp(min=0) for square, total in zip(squares, sums, strict=True)]
    floor = 1e-6 * count  # a flat overlap agrees with nothing
    return shared / ((variance[0] + floor) * (variance[1] + floor)).sqrt()


def shift_response(before: Tensor, after: Tensor, stated: tuple[float, float]) -> Tensor:
    """Return how much of a stated displacement (down, right) in px came true, (B,2): along it (1 is all), across it."""
    moved = displacement(before, after)
    direction = torch.tensor(stated, dtype=moved.dtype)
    length = direction.norm()
    along = moved @ direction / length**2
    beside = (moved[:, 0] * direction[1] - moved[:, 1] * direction[0]) / length**2
    return torch.stack([along, beside], dim=1)


def content_shift(shift: tuple[float, float], height: int, width: int) -> tuple[float, float]:
    """Return the pixels (down, right) by which content moves when the camera shifts by (y, x) in position units.

    The paper's positions span ±√(H/W) and ±√(W/H), so both axes have √(H·W)/2 pixels per unit; content moves opposite
    to the camera.
    """
    pixels_per_unit = (height * width) ** 0.5 / 2
    return -shift[0] * pixels_per_unit, -shift[1] * pixels_per_unit


def zoom_response(before: Tensor, after: Tensor, zoom: float) -> Tensor:
    """Return how much of a stated zoom (other than 1) came true, (B,): log(found) / log(stated), 1 is all.

    The zoom found is the candidate for which the zoomed `before` correlates best with `after`; both (B,3,H,W).
    """
    if zoom <= 0 or zoom == 1:
        raise ValueError(f"zoom: got {zoom}, expected above 0 and not 1")
    grey, target = luminance(before)[:, None], luminance(after)
    responses = torch.linspace(-1.0, 3.0, ZOOMS)
    scores = torch.stack([_correlation(_zoomed(grey, zoom ** float(r)), target) for r in responses], dim=1)
    best = scores.argmax(1)
    step = responses[1] - responses[0]
    return responses[best] + step * _refined(scores, best)


def log_anisotropy(images: Tensor) -> Tensor:
    """Return half the logarithm of vertical over horizontal gradient energy, (B,).

    0 for content without a direction; log s after stretching such content by s in x.
    """
    grey = luminance(images)
    across = grey.diff(dim=2).square().mean((1, 2))
    down = grey.diff(dim=1).square().mean((1, 2))
    # A flat image has no direction: the floor (1e-4 of the range of gray levels) makes its value 0.
    return 0.5 * torch.log((down + _FLAT**2) / (across + _FLAT**2))


def stretch_estimate(images: Tensor, squares: Tensor, bootstrap: Bootstrap) -> Estimate:
    """Estimate the stretch in x of images (B,3,H,W) relative to squares (B,3,X,X) of the same prompts (geometric mean).

    1 is no stretch; width / height means that the squares were pulled to the frame. Pairs are resampled.
    Raises ValueError: there is not one square for each image.
    """
    if len(images) != len(squares):
        raise ValueError(f"squares: got {len(squares)} for {len(images)} images, expected one each")
    difference = (log_anisotropy(images) - log_anisotropy(squares)).cpu().double().numpy()
    found = bootstrap.mean(difference)
    value, low, high = (float(torch.tensor(x).exp()) for x in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.samples, found.method, found.resamples)


def _zoomed(grey: Tensor, zoom: float) -> Tensor:
    """Return gray images (B,1,H,W) as a camera closer by `zoom` sees them, (B,H,W); NaN beyond the edge."""
    theta = torch.tensor([[1 / zoom, 0.0, 0.0], [0.0, 1 / zoom, 0.0]]).expand(len(grey), 2, 3)
    grid = F.affine_grid(theta, list(grey.shape), align_corners=False)
    seen = F.grid_sample(grey, grid, align_corners=False, padding_mode="border")[:, 0]
    outside = (grid.abs() > 1).any(-1)
    return seen.masked_fill(outside, float("nan"))


def _correlation(seen: Tensor, target: Tensor) -> Tensor:
    """Return the correlation coefficient (B,) over the pixels where `seen` is not NaN."""
    known = ~seen.isnan()
    count = known.sum((1, 2)).clamp(min=1)

    def centred(grey: Tensor) -> Tensor:
        values = torch.where(known, grey, 0.0)
        return torch.where(known, values - (values.sum((1, 2)) / count)[:, None, None], 0.0)

    one, other = centred(seen), centred(target)
    norms = (one.square().sum((1, 2)) * other.square().sum((1, 2))).sqrt()
    return (one * other).sum((1, 2)) / (norms + 1e-6 * count)


def _refined(scores: Tensor, peak: Tensor) -> Tensor:
    """Return the offset (B,) in [−1/2, 1/2] of the top of the parabola through each row's peak and its neighbors."""
    inside = peak.clamp(1, scores.shape[1] - 2)
    index = torch.arange(len(peak))
    left, middle, right = (scores[index, inside + step] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    offset = torch.where(bend < 0, 0.5 * (left - right) / bend.clamp(max=-1e-12), torch.zeros_like(bend))
    return torch.where(inside == peak, offset.clamp(-0.5, 0.5), torch.zeros_like(offset))
