"""The RPN of the match detectors: detectron2's, with the original's loss reduction and joint proposals by key."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import (
    PROPOSAL_GENERATOR_REGISTRY,
    RPN,
    RPN_HEAD_REGISTRY,
    StandardRPNHead,
)
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .losses import check_reduction, mean_over_ranks, rpn_normalizers


@RPN_HEAD_REGISTRY.register()
class MatchRPNHead(StandardRPNHead):
    """detectron2's head; a level may also be an object that computes its hidden map itself.

    Such an object has ``shape`` and ``hidden(activation)``: the map after this head's convolution.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        """Arguments as in detectron2, with one convolution.

        Raises:
            ValueError: several convolutions; what they do is not linear.
        """
        super().__init__(**kwargs)
        if not isinstance(self.conv, nn.Conv2d):
            raise ValueError(
                f"MODEL.RPN.CONV_DIMS must have one number, got {kwargs.get('conv_dims')}"
            )

    def forward(self, features: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness (P, A, H, W) and deltas (P, 4 A, H, W) of each level."""
        hidden = [
            self.conv(level) if isinstance(level, Tensor) else level.hidden(self.conv.activation)
            for level in features
        ]
        return [self.objectness_logits(h) for h in hidden], [self.anchor_deltas(h) for h in hidden]


@PROPOSAL_GENERATOR_REGISTRY.register()
class MatchRPN(RPN):
    """detectron2's RPN; "images" are (query, class) pairs.

    One logit with a sigmoid is the two-way softmax of the original, in one parameter less.
    """

    @configurable
    def __init__(self, *, loss_reduction: str, joint_levels: bool, **kwargs: Any):
        """Add to detectron2's arguments.

        Args:
            loss_reduction: "detectron2" or "original".
            joint_levels: top-k and NMS over all levels together (original) instead of level by level.
        """
        super().__init__(**kwargs)
        self.loss_reduction = check_reduction(loss_reduction)
        self.joint_levels = joint_levels

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read the keys."""
        return {
            **super().from_config(cfg, input_shape),
            "loss_reduction": cfg.MODEL.MATCH.LOSS_REDUCTION,
            "joint_levels": cfg.MODEL.MATCH.JOINT_PROPOSALS,
        }

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """detectron2's sums with the chosen normalisers; arguments as there."""
        losses = super().losses(
            anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
        )
        labels = torch.stack(gt_labels)
        own_normalizer = self.batch_size_per_image * len(gt_labels)
        for_class, for_box = rpn_normalizers(
            self.loss_reduction,
            num_slots=mean_over_ranks(own_normalizer, labels.device),
            num_sampled=mean_over_ranks((labels >= 0).sum().item(), labels.device),
            num_positive=mean_over_ranks((labels == 1).sum().item(), labels.device),
        )
        return {
            "loss_rpn_cls": losses["loss_rpn_cls"] * (own_normalizer / for_class),
            "loss_rpn_loc": losses["loss_rpn_loc"] * (own_normalizer / for_box),
        }

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Proposals of each pair; arguments as in detectron2."""
        if self.joint_levels:
            anchors = [Boxes.cat(anchors)]
            pred_objectness_logits = [torch.cat(pred_objectness_logits, dim=1)]
            pred_anchor_deltas = [torch.cat(pred_anchor_deltas, dim=1)]
        return super().predict_proposals(
            anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
        )
