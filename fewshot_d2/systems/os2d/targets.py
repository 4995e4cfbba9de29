"""Which places are positives and negatives, and what their boxes should be (OS2D, paper 4; spec 1.11).

K classes of one query, n places, G ground-truth boxes. Boxes are XYXY in pixels of the network's image.
"""

from dataclasses import dataclass

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Instances
from torch import Tensor

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
# The usual encoding; its limit on width and height is the original's too.
BOX_CODER = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))


@dataclass(frozen=True)
class GroundTruth:
    """What is annotated in a query.

    Attributes:
        boxes (Tensor[G, 4]): at least one pixel wide and high. classes (int64[G]): 0..K-1.
        difficult (bool[G]): neither to be found nor to be missed.
    """

    boxes: Tensor
    classes: Tensor
    difficult: Tensor

    @classmethod
    def of(cls, instances: Instances, classes: Tensor) -> "GroundTruth":
        """The objects that count for class images, each for all images of its class.

        Args:
            instances: with ``gt_boxes``, ``gt_classes`` and, where there is one, ``gt_difficult``.
            classes (int64[R]): of each class image, on the CPU; ``classes`` of the result are their positions.
        """
        instances = instances.to("cpu")
        boxes = with_least_side(instances.gt_boxes.tensor.float())
        difficult = torch.zeros(len(boxes), dtype=torch.bool)
        if instances.has("gt_difficult"):
            difficult = torch.as_tensor(instances.gt_difficult).bool()
        image, box = (classes[:, None] == instances.gt_classes).nonzero(as_tuple=True)
        return cls(boxes[box], image, difficult[box])

    def to(self, device: torch.device) -> "GroundTruth":
        """The same on another device."""
        return GroundTruth(*(tensor.to(device) for tensor in vars(self).values()))


def with_least_side(boxes: Tensor) -> Tensor:
    """Boxes (Tensor[..., 4]) with right and bottom moved where they are less than a pixel away."""
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat([first, torch.maximum(second, first + 1)], dim=-1)


def overlaps(boxes: Tensor, truth: GroundTruth) -> Tensor:
    """IoU of the boxes searched for each class with the ground truth of that class alone.

    Args:
        boxes (Tensor[K, n, 4]).

    Returns:
        Tensor[K, G, n]: -1 for another class's.
    """
    first = torch.maximum(boxes[:, None, :, :2], truth.boxes[:, None, :2])
    second = torch.minimum(boxes[:, None, :, 2:], truth.boxes[:, None, 2:])
    common = (second - first).clamp(min=0).prod(dim=-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(dim=-1) for b in (boxes[:, None], truth.boxes[:, None])]
    own = truth.classes == torch.arange(len(boxes), device=boxes.device)[:, None]
    return torch.where(own[:, :, None], common / (areas[0] + areas[1] - common), -1.0)


@torch.no_grad()
def assign(
    boxes: Tensor, truth: GroundTruth, thresholds: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Label every place for every class.

    Args:
        boxes (Tensor[K, n, 4]): anchors, or what was predicted (remapping).
        thresholds: IoU from which on a place is positive, and below which it is negative.

    Returns:
        Labels (int64[K, n]) and positions of the best ground truth (int64[K, n]), 0 where there is none.
    """
    if not len(truth.boxes):
        nothing = torch.zeros(boxes.shape[:2], dtype=torch.int64, device=boxes.device)
        return nothing, nothing
    best, position = overlaps(boxes, truth).max(dim=1)
    high, low = thresholds
    labels = torch.where(best < low, NEGATIVE, IGNORED)
    labels = labels.masked_fill((best >= high) & ~truth.difficult[position], POSITIVE)
    return labels, position


def localization_losses(boxes: Tensor, anchors: Tensor, targets: Tensor) -> Tensor:
    """Smooth L1 between encodings, summed over the four numbers.

    Args:
        boxes, anchors, targets (Tensor[B, 4]): predicted, encoded against, and wanted.

    Returns:
        Tensor[B].
    """
    predicted = BOX_CODER.get_deltas(anchors, boxes)
    wanted = BOX_CODER.get_deltas(anchors, targets)
    return torch.nn.functional.smooth_l1_loss(predicted, wanted, reduction="none").sum(dim=1)
