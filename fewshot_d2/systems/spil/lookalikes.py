"""Look-alikes: what co-attention marks outside the box of the instance (paper 3.2, figure 3).

They may be further instances without a label, so that no anchor or proposal on them is learned as background (spec
B3, item 29). Boxes are XYXY in pixels of the network's image, H x W.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor


def set_lookalikes(target: Instances, pixels: Tensor) -> None:
    """Mark pixels (bool[H, W]) of a target as look-alikes; one without an instance has none (negative pass)."""
    target.lookalikes = pixels.expand(len(target), *pixels.shape)


def is_covered(target: Instances, boxes: Boxes, coverage: float) -> Tensor:
    """Which boxes consist of look-alikes by a share of at least ``coverage``: bool[N]."""
    if not len(target) or not target.has("lookalikes"):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    return covered_share(target.lookalikes[0], boxes.tensor) >= coverage


def covered_share(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Share of each box's area inside the image that is marked; exact for boxes that cut pixels.

    Args:
        pixels (bool[H, W]), boxes (float[N, 4]).

    Returns:
        float64[N]: 0 for boxes without an area in the image.
    """
    height, width = pixels.shape
    x0, x1 = boxes[:, 0::2].double().clamp(0, width).unbind(dim=1)
    y0, y1 = boxes[:, 1::2].double().clamp(0, height).unbind(dim=1)
    sums = F.pad(pixels.double().cumsum(dim=0).cumsum(dim=1), (1, 0, 1, 0))

    def below(y: Tensor, x: Tensor) -> Tensor:
        """Marked area above and left of a point: the sums interpolated, for a pixel counts evenly."""
        row, column = y.long().clamp(max=height - 1), x.long().clamp(max=width - 1)
        upper, lower = (
            torch.lerp(sums[r, column], sums[r, column + 1], x - column) for r in (row, row + 1)
        )
        return torch.lerp(upper, lower, y - row)

    marked = below(y1, x1) - below(y0, x1) - below(y1, x0) + below(y0, x0)
    area = (x1 - x0).clamp(min=0) * (y1 - y0).clamp(min=0)
    return torch.where(area > 0, marked / area, 0.0)


def without_lookalikes(proposals: Instances, target: Instances, coverage: float) -> Instances:
    """The proposals that do not lie on look-alikes.

    From a coverage of a half on, none of those that are left out would have been foreground: look-alikes are outside of
    all boxes of the target, to the pixel, so half a box of them leaves an IoU of a half at most.
    """
    return proposals[~is_covered(target, proposals.proposal_boxes, coverage)]


@PROPOSAL_GENERATOR_REGISTRY.register()
class LookalikeRPN(RPN):
    """detectron2's RPN that ignores anchors on look-alikes and gives its losses pair by pair.

    "Images" are (query, class) pairs. Each loss is Tensor[P], for every pair has a weight of its own (paper eq. 1).
    """

    @configurable
    def __init__(self, *, lookalike_coverage: float, **kwargs: Any):
        """Add to detectron2's arguments the share of ``is_covered``."""
        super().__init__(**kwargs)
        self.lookalike_coverage = lookalike_coverage

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read the keys."""
        parts = super().from_config(cfg, input_shape)
        return {**parts, "lookalike_coverage": cfg.MODEL.SPIL.LOOKALIKE_COVERAGE}

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """detectron2's labels (0, 1, -1 = ignored); negative anchors on look-alikes are ignored too."""
        labels, boxes = super().label_and_sample_anchors(anchors, gt_instances)
        every_anchor = Boxes.cat(anchors)
        for label, target in zip(labels, gt_instances, strict=True):
            covered = is_covered(target, every_anchor, self.lookalike_coverage)
            label[covered & (label == 0)] = -1
        return labels, boxes

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """detectron2's losses of each pair alone, Tensor[P]; arguments as there."""
        of_pairs = [
            super(LookalikeRPN, self).losses(
                anchors,
                [level[p : p + 1] for level in pred_objectness_logits],
                [gt_labels[p]],
                [level[p : p + 1] for level in pred_anchor_deltas],
                [gt_boxes[p]],
            )
            for p in range(len(gt_labels))
        ]
        return {name: torch.stack([losses[name] for losses in of_pairs]) for name in of_pairs[0]}
