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


def unit_vectors(features: Tensor, *, dim: int, epsilon: float) -> Tensor:
    """Features (Tensor[...]) divided by their length along ``dim`` plus ``epsilon``: zero stays zero (OS2D)."""
    return features / (torch.linalg.vector_norm(features, dim=dim, keepdim=True) + epsilon)


def dense_correlation(cells: Tensor, features: Tensor, counts: Sequence[int]) -> Tensor:
    """Products of every cell of a class image with every place of its query (OS2D, paper 3).

    Args:
        cells (Tensor[R, M, C]): M cells of each class image, those of the first query first.
        features (Tensor[N, C, H, W]): maps of the queries. counts: class images of each of the N queries.

    Returns:
        Tensor[R, M, H, W]: cosines, where both are unit vectors.
    """
    num_cells = cells.shape[1]
    products = [
        of_query.flatten(0, 1) @ feature.flatten(1)
        for of_query, feature in zip(cells.split(list(counts)), features, strict=True)
    ]
    joined = products[0] if len(products) == 1 else torch.cat(products)
    return joined.view(len(cells), num_cells, *features.shape[2:])


def resample_channels(maps: Tensor, places: Tensor) -> Tensor:
    """Bilinear samples of every channel at places of its own; outside the map its border goes on.

    Args:
        maps (Tensor[R, M, H, W]). places (Tensor[R, M, n, 2]): (x, y), -1 and 1 are the first and the last cell.

    Returns:
        Tensor[R, M, n].
    """
    rows, channels, height, width = maps.shape
    # Channels as a batch of one channel each: the library's kernel then needs no loop over them.
    samples = F.grid_sample(
        maps.reshape(rows * channels, 1, height, width),
        places.reshape(rows * channels, 1, places.shape[2], 2),
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )
    return samples.view(rows, channels, places.shape[2])
