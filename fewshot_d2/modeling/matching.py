"""Pure functions that compare a query with supports; larger never means worse here without saying so.

Shapes: N queries, K classes, S shots, P (query, class) pairs, C,H,W query map, h,w support map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def average_pool(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over space.

    Args:
        features (Tensor[B, C, h, w]).
        valid (Tensor[B, h, w] or None): bool, cells that count; None = all, padding included (the original).

    Returns:
        Tensor[B, C]; zero where no cell is valid.
    """
    if valid is None:
        return features.mean(dim=(2, 3))
    weight = valid.to(features.dtype)[:, None]
    return (features * weight).sum(dim=(2, 3)) / weight.sum(dim=(2, 3)).clamp(min=1)


def mean_over_shots(vectors: Tensor, num_shots: Sequence[int]) -> Tensor:
    """Average the examples of each class (spec 1.4).

    Args:
        vectors (Tensor[sum(num_shots), ...]): examples, class after class.
        num_shots: examples of each of the K classes, each at least 1.

    Returns:
        Tensor[K, ...].
    """
    if not len(num_shots):
        return vectors[:0]
    counts = torch.tensor(num_shots, device=vectors.device)
    owner = torch.repeat_interleave(torch.arange(len(num_shots), device=vectors.device), counts)
    sums = vectors.new_zeros(len(num_shots), *vectors.shape[1:]).index_add(0, owner, vectors)
    return sums / counts.view(-1, *[1] * (vectors.dim() - 1))


def absolute_difference(features: Tensor, vectors: Tensor) -> Tensor:
    """|features - vector| at every place: a distance, zero where query and support agree.

    Args:
        features (Tensor[P, C, H, W]), vectors (Tensor[P, C]).
    """
    return (features - vectors[:, :, None, None]).abs_()


def matched_features(features: Tensor, vectors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W [F, |F - r|] + b, the matching of paper 4.3 and appendix 1.2, written out.

    Args:
        features (Tensor[P, C, H, W]): query map, one a pair. vectors (Tensor[P, C]): pooled supports.
        weight (Tensor[D, 2C, 1, 1]), bias (Tensor[D]): the 1x1 convolution.

    Returns:
        Tensor[P, D, H, W].
    """
    joined = torch.cat([features, absolute_difference(features, vectors)], dim=1)
    return F.conv2d(joined, weight, bias)


def depthwise_correlation(features: Tensor, kernels: Tensor) -> Tensor:
    """Depth-wise cross-correlation with kernels of one cell: each channel times its own number (SPIL 3.1, eq. 3).

    Args:
        features (Tensor[P, C, H, W]), kernels (Tensor[P, C]).

    Returns:
        Tensor[P, C, H, W].
    """
    return features * kernels[:, :, None, None]
