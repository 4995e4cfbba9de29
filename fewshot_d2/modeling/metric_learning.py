"""Distance metric learning with several representatives a class: RepMet's distances, posteriors and losses.

Shapes: R embeddings, N classes, M modes a class (its representatives), D dimensions. Pure functions. Background has
no representative; where it has a column it is the last one, as everywhere in detectron2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Keeps posteriors away from zero (spec 1.3, steps 3 and 4).
_EPSILON = 1e-7


def squared_distances(
    embeddings: Tensor, representatives: Tensor, filled: Tensor | None = None
) -> Tensor:
    """Squared L2 distances of the normalised vectors, 2 - 2 cos, between 0 and 4 (spec 1.2, 1.3).

    In mixed precision too they are float32: a half keeps three digits of a cosine, and near 1 all of them matter.

    Args:
        embeddings (Tensor[R, D]), representatives (Tensor[N, M, D]): of any length; both are normalised here.
        filled (Tensor[N, M] or None): bool, modes that exist; an empty one is infinitely far.

    Returns:
        Tensor[R, N, M].
    """
    exact = torch.promote_types(embeddings.dtype, torch.float32)
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = F.normalize(embeddings.to(exact), dim=-1)
        representatives = F.normalize(representatives.to(exact), dim=-1)
        cosines = torch.einsum("rd,nmd->rnm", embeddings, representatives)
    distances = (2 - 2 * cosines).clamp(min=0)
    return distances if filled is None else distances.masked_fill(~filled, torch.inf)


def detection_posteriors(distances: Tensor, sigma: float) -> Tensor:
    """Posterior of each class and of background (paper eq. 2 and 3, spec 1.3).

    A class has that of its nearest mode, so the gradient reaches this mode alone; background has what the best class
    leaves. They do not sum to 1.

    Args:
        distances (Tensor[R, N, M]): squared. sigma: width of a mode.

    Returns:
        Tensor[R, N + 1]: background last.
    """
    classes = torch.exp(-distances.amin(dim=2) / (2 * sigma**2)) + _EPSILON
    background = 1 + _EPSILON - classes.amax(dim=1, keepdim=True)
    return torch.cat([classes, background], dim=1)


def mixture_log_posteriors(distances: Tensor, sigma: float) -> Tensor:
    """Logarithm of the posterior of classification, a sum over modes, without background (paper eq. 5).

    Args:
        distances (Tensor[R, N, M]): squared. sigma: width of a mode.

    Returns:
        Tensor[R, N]: exponentials sum to 1.
    """
    return torch.logsumexp(-distances / (2 * sigma**2), dim=2).log_softmax(dim=1)


def margin_losses(distances: Tensor, labels: Tensor, margin: float) -> Tensor:
    """How much nearer than ``margin`` the nearest wrong mode is, beyond the nearest right one (paper eq. 4).

    Args:
        distances (Tensor[R, N, M]): squared, as in the original code, or not. labels (Tensor[R]): 0..N-1; no
            background, which has no mode to be near to.
        margin: in the unit of ``distances``.

    Returns:
        Tensor[R]: zero where there is no other class.
    """
    nearest = distances.amin(dim=2)
    own = F.one_hot(labels, nearest.shape[1]).bool()
    wrong = nearest.masked_fill(own, torch.inf).amin(dim=1)
    return F.relu(nearest[own] - wrong + margin)


def hard_triplet_losses(
    embeddings: Tensor, labels: Tensor, margin: float, background: int
) -> Tensor:
    """Batch-hard triplets of ROIs: the farthest of the own class against the nearest of all others.

    Args:
        embeddings (Tensor[R, D]): of any length; they are normalised here. labels (Tensor[R]).
        margin: in squared distance. background: this label is an other for every class, but no anchor.

    Returns:
        Tensor[A]: of the ROIs that have another one of their class and one of another label.
    """
    if not len(labels):
        return embeddings.new_zeros(0)
    distances = squared_distances(embeddings, embeddings[:, None])[:, :, 0]
    is_same = labels[:, None] == labels
    is_other = ~is_same
    is_same = is_same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    farthest = distances.masked_fill(~is_same, -torch.inf).amax(dim=1)
    nearest = distances.masked_fill(~is_other, torch.inf).amin(dim=1)
    is_anchor = (labels != background) & is_same.any(dim=1) & is_other.any(dim=1)
    return F.relu(farthest[is_anchor] - nearest[is_anchor] + margin)
