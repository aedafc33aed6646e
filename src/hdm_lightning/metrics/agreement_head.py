"""A small dual head on frozen image and text features that scores how well an image matches a caption, without a CLIP.

Shapes: N pairs; image features (N,I); text features (N,T); embeddings (N,E); scores (N,N).

Trained with the contrastive loss of CLIP (arXiv 2103.00020, figure 3) on pairs of the training set. The head cannot
check what the frozen image features do not show (such as positions of objects); its score on held-out real pairs tells
how much it can check.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_PAIRS = 256
_EMBEDDING_WIDTH, _HIDDEN_WIDTH = 128, 256
_LEARNING_RATE, _WEIGHT_DECAY = 1e-3, 0.05
_CHECKS, _KEPT_OUT = 20, 0.1


class DualHead(nn.Module):
    """Two small MLPs that map features to unit vectors, standardized by the features passed here, (N,I) and (N,T)."""

    def __init__(self, image_features: Tensor, text_features: Tensor) -> None:
        super().__init__()
        self.image, self.text = _branch(image_features), _branch(text_features)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return the cosine similarity of every image with every caption, (N,M)."""
        return F.normalize(self.image(image_features), dim=1) @ F.normalize(self.text(text_features), dim=1).T


def fit_dual_head(
    image_features: Tensor,
    text_features: Tensor,
    captions: Sequence[str],
    *,
    steps: int = 600,
    batch: int = 256,
    seed: int = 0,
) -> DualHead:
    """Train a head with AdamW and return the best of 20 snapshots on held-out pairs; the global random state is kept.

    An image counts as a match of every caption equal to its own; `seed` is that of weights, split and batches.
    Raises ValueError: there are too few pairs, or the numbers of captions and features differ.
    """
    pairs = len(captions)
    if not pairs == len(image_features) == len(text_features) or pairs < FEWEST_PAIRS:
        raise ValueError(f"captions: got {pairs} pairs, expected at least {FEWEST_PAIRS}, one row of features each")
    data = (image_features.float(), text_features.float(), _groups(captions, image_features.device))
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        order = torch.randperm(pairs)
        kept_out, used = order[: int(_KEPT_OUT * pairs)], order[int(_KEPT_OUT * pairs) :]
        head = DualHead(data[0][used], data[1][used]).to(image_features.device)
        optimizer = torch.optim.AdamW(head.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        best, state = float("inf"), {}
        for step in range(1, steps + 1):
            rows = used[torch.randint(len(used), (min(batch, len(used)),))]
            loss = _contrast(head, *(part[rows] for part in data))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % max(1, steps // _CHECKS) == 0:
                with torch.no_grad():
                    checked = float(_contrast(head, *(part[kept_out] for part in data)))
                if checked < best:
                    best, state = checked, {name: value.clone() for name, value in head.state_dict().items()}
        head.load_state_dict(state)
    return head.eval().requires_grad_(False)


def rank_shares(scores: Tensor, captions: Sequence[str]) -> Tensor:
    """Return for each image the share of other captions that its own caption outscores, (N,): 1 is best, 0.5 is chance.

    `scores` (N,N) are of images with captions, matching pairs on the diagonal; captions equal to an image's own are
    skipped. Raises ValueError: all captions are equal, so there is no other one.
    """
    groups = _groups(captions, scores.device)
    other = groups[:, None] != groups[None, :]
    if not other.any(1).all():
        raise ValueError("captions: all are equal, expected different ones")
    own = scores.diagonal()[:, None]
    won = (own > scores).double() + 0.5 * (own == scores).double()
    return (won * other).sum(1) / other.sum(1)


def _groups(captions: Sequence[str], device: torch.device) -> Tensor:
    """Return a number for each caption, (N,), the same for equal captions."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    return torch.tensor([numbers[caption] for caption in captions], device=device)


def _contrast(head: DualHead, image_features: Tensor, text_features: Tensor, groups: Tensor) -> Tensor:
    """Return the cross-entropy averaged over both directions; equal captions share the target."""
    logits = head(image_features, text_features) * head.log_scale.clamp(max=4.6).exp()
    same = (groups[:, None] == groups[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


class _Standardise(nn.Module):
    """(x − mean) / std, with the mean and std of the features it was built with."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("std", features.std(0).clamp(min=1e-4))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


def _branch(features: Tensor) -> nn.Sequential:
    hidden = nn.Linear(features.shape[1], _HIDDEN_WIDTH)
    return nn.Sequential(_Standardise(features), hidden, nn.GELU(), nn.Linear(_HIDDEN_WIDTH, _EMBEDDING_WIDTH))
