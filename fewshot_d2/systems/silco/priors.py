"""Prior boxes of SSD, what they are to find, and what is left of what they find (spec A2, A6).

A priors of all maps in the order map, row, column, prior; G true boxes. All boxes are XYXY in pixels of the network's
image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_convert, nms


@dataclass(frozen=True)
class PriorBoxes:
    """Places the priors of the maps that are used.

    Attributes:
        steps: pixels between two cells of each map.
        sizes: sides in pixels of the smaller and of the larger square, whose geometric mean is the second prior's side.
        aspect_ratios: of each map, besides 1; each also stands for its inverse.
    """

    steps: Sequence[float]
    sizes: Sequence[tuple[float, float]]
    aspect_ratios: Sequence[Sequence[float]]

    @property
    def per_cell(self) -> list[int]:
        """Priors of a cell of each map."""
        return [2 + 2 * len(ratios) for ratios in self.aspect_ratios]

    def __call__(self, maps: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """The priors (Tensor[A, 4]) of maps (Tensor[P, C, H, W]) of images of (height, width) pixels.

        Centres and sides are at most the image, so a box may leave it.
        """
        height, width = image_size
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        parts = []
        for features, step, size, ratios in zip(
            maps, self.steps, self.sizes, self.aspect_ratios, strict=True
        ):
            sides = _sides(*size, ratios)
            rows, columns = ((torch.arange(n) + 0.5) * step for n in features.shape[-2:])
            centres = torch.cartesian_prod(rows, columns).flip(1)
            grid = [
                centres[:, None].expand(-1, len(sides), -1),
                sides.expand(len(centres), -1, -1),
            ]
            parts.append(torch.cat(grid, dim=2).flatten(0, 1))
        boxes = torch.minimum(torch.cat(parts), limit)
        return box_convert(boxes, "cxcywh", "xyxy").to(maps[0].device)


def _sides(size: float, larger: float, ratios: Sequence[float]) -> Tensor:
    """(width, height) of the priors of a cell, Tensor[2 + 2 R, 2]."""
    middle = (size * larger) ** 0.5
    sides = [(size, size), (middle, middle)]
    for ratio in ratios:
        long, short = size * ratio**0.5, size / ratio**0.5
        sides += [(long, short), (short, long)]
    return torch.tensor(sides)


def assigned(overlaps: Tensor, threshold: float) -> Tensor:
    """Which true box each prior is to find: that of the highest IoU from ``threshold`` up, and every true box by one.

    Args:
        overlaps (Tensor[G, A]): IoU.

    Returns:
        int64 Tensor[A]: number of the true box, or -1. Of two with the same best prior the later one has it.
    """
    boxes, priors = overlaps.shape
    if not boxes:
        return overlaps.new_full((priors,), -1, dtype=torch.int64)
    best, found = overlaps.max(dim=0)
    found = torch.where(best >= threshold, found, -1)
    numbers = torch.arange(boxes, device=overlaps.device)
    forced = torch.full_like(found, -1)
    forced.scatter_reduce_(0, overlaps.argmax(dim=1), numbers, "amax")
    return torch.where(forced >= 0, forced, found)


def best_boxes(
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    *,
    threshold: float,
    top_k: int,
    nms_iou: float,
) -> Instances:
    """The ``top_k`` boxes above the threshold without those that NMS drops, all of class 0; best first.

    Args:
        boxes (Tensor[A, 4]), scores (Tensor[A]): of one query and class. image_size: (height, width).
    """
    top = scores.topk(min(top_k, len(scores))).indices
    top = top[scores[top] > threshold]
    kept = top[nms(boxes[top], scores[top], nms_iou)]
    return Instances(
        image_size,
        pred_boxes=Boxes(boxes[kept]),
        scores=scores[kept],
        pred_classes=torch.zeros_like(kept),
    )
