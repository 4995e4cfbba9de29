"""What images have in common, found without any box or label: the first principal component of their features.

After deep descriptor transforming, which SPIL's co-attention is (paper 3.2). N images, C,H,W a map; boxes are XYXY.
"""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Coarser maps tell objects from their surroundings better, up to where they have too few cells.
_LARGEST_STRIDE = 16
# Vectors of length 1 that differ less are equal but for rounding.
_LEAST_DIFFERENCE = 1e-4


def first_component(
    points: Tensor, *, tolerance: float = 1e-7, max_iterations: int = 1000
) -> Tensor:
    """Direction in which points differ most: the first eigenvector of their covariance, by power iteration.

    Args:
        points (Tensor[n, C]). tolerance: of 1 - cosine between two iterations.
        max_iterations: bounds the time where the two largest eigenvalues are almost equal, and either will do.

    Returns:
        Tensor[C]: of length 1 and any sign; zero where all points are the same.
    """
    centred = points - points.mean(dim=0)
    covariance = centred.T @ centred
    # Not orthogonal to the eigenvector but by a chance of probability zero, and the same in every run.
    start = torch.randn(points.shape[1], generator=torch.Generator().manual_seed(0))
    vector = F.normalize(start.to(points), dim=0)
    for _ in range(max_iterations):
        before, vector = vector, F.normalize(covariance @ vector, dim=0)
        if 1 - vector @ before < tolerance:
            break
    return vector


def enlarged(cells: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """A map (Tensor[H, W]) at the image's resolution, bilinear (spec B3, item 26)."""
    shape = [side * stride for side in cells.shape]
    pixels = F.interpolate(cells[None, None], shape, mode="bilinear", align_corners=False)
    return pixels[0, 0, : size[0], : size[1]]


def common_maps(maps: Sequence[Tensor]) -> list[Tensor]:
    """How much each cell belongs to what the images have in common; of one image, to what stands out in it.

    Cells are compared by the direction of their vectors alone. The component has no sign of its own: at the images'
    borders there must be less of it than elsewhere.

    Args:
        maps (Tensor[C, H, W] each): of one layer, without padding; sizes may differ.

    Returns:
        Tensor[H, W] each: the largest of all is 1, what is not common is 0.
    """
    # Of unit length: otherwise a few strong cells, at borders and on textures, are most of the variance.
    maps = [F.normalize(m, dim=0) for m in maps]
    points = torch.cat([m.flatten(1).T for m in maps])
    component = first_component(points)
    offset = points.mean(dim=0) @ component
    projected = [torch.einsum("chw,c->hw", m, component) - offset for m in maps]
    border = torch.cat([p[_is_border(p)] for p in projected]).mean()
    if border > torch.cat([p.flatten() for p in projected]).mean():
        projected = [-p for p in projected]
    projected = [p.clamp(min=0) for p in projected]
    peak = max(p.max() for p in projected)
    if peak < _LEAST_DIFFERENCE:
        return [torch.zeros_like(p) for p in projected]
    return [p / peak for p in projected]


def _is_border(cells: Tensor) -> Tensor:
    border = torch.ones_like(cells, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border


def largest_region(attention: Tensor, threshold: float) -> tuple[list[int], float] | None:
    """Box of the largest connected region above a threshold, and its mean attention; None where nothing is above.

    Args:
        attention (Tensor[H, W]): at the image's resolution.
    """
    above = (attention > threshold).cpu().numpy().astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    if count < 2:
        return None
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    x, y, width, height = stats[largest, : cv2.CC_STAT_AREA].tolist()
    inside = torch.from_numpy(labels == largest).to(attention.device)
    return [x, y, x + width, y + height], float(attention[inside].mean())


@torch.no_grad()
def common_boxes(
    detector: Any, queries: Sequence[dict[str, Any]], *, threshold: float
) -> list[tuple[Tensor, float] | None]:
    """The box of what images have in common in each of them, by the trunk of any detector.

    Args:
        detector: a ``FewShotDetector``; its backbone, or the bottom-up of an FPN, gives the maps.
        queries: query dicts, see ``structures``. threshold: share of the largest attention that a region has.

    Returns:
        (Tensor[4] in pixels of the original image, mean attention inside) of each; None where nothing is found.
    """
    trunk = getattr(detector.backbone, "bottom_up", detector.backbone)
    shapes = trunk.output_shape()
    strides = {name: shape.stride for name, shape in shapes.items()}
    fine = {name: s for name, s in strides.items() if s <= _LARGEST_STRIDE}
    layer = max(fine, key=fine.get) if fine else min(strides, key=strides.get)
    stride, maps, sizes = strides[layer], [], []
    for query in queries:
        images = detector.preprocess([query])
        ((height, width),) = images.image_sizes
        cells = trunk(images.tensor)[layer][0].float()
        maps.append(cells[:, : math.ceil(height / stride), : math.ceil(width / stride)])
        sizes.append((height, width))
    found = []
    for query, attention, size in zip(queries, common_maps(maps), sizes, strict=True):
        region = largest_region(enlarged(attention, stride, size), threshold)
        scale = torch.tensor([query["width"] / size[1], query["height"] / size[0]] * 2)
        found.append(None if region is None else (torch.tensor(region[0]) * scale, region[1]))
    return found
