"""Class-agnostic box and mask heads that tell "match" from "no match"; an "image" is a (query, class) pair."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Instances
from torch import Tensor

from .losses import check_reduction, mean_over_ranks, roi_normalizers

NEGATIVE_RULES = ("fill", "proportional")


class MatchOutputLayers(FastRCNNOutputLayers):
    """detectron2's predictor with one foreground class and the chosen loss normalisers."""

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, loss_reduction: str, rois_per_image: int, **kwargs: Any
    ):
        """Add to detectron2's arguments the reduction and the number of ROI slots a pair has."""
        super().__init__(input_shape, **kwargs)
        self.loss_reduction = check_reduction(loss_reduction)
        self.rois_per_image = rois_per_image

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the keys."""
        return {
            **super().from_config(cfg, input_shape),
            "loss_reduction": cfg.MODEL.MATCH.LOSS_REDUCTION,
            "rois_per_image": cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
        }

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """detectron2's losses, which are means over the ROIs here, with the chosen normalisers."""
        losses = super().losses(predictions, proposals)
        labels = torch.cat([p.gt_classes for p in proposals])
        positive = ((labels >= 0) & (labels < self.num_classes)).sum().item()
        for_class, for_box = roi_normalizers(
            self.loss_reduction,
            num_slots=mean_over_ranks(self.rois_per_image * len(proposals), labels.device),
            num_sampled=mean_over_ranks(len(labels), labels.device),
            num_positive=mean_over_ranks(positive, labels.device),
        )
        return {
            "loss_cls": losses["loss_cls"] * (len(labels) / for_class),
            "loss_box_reg": losses["loss_box_reg"] * (len(labels) / for_box),
        }


@ROI_MASK_HEAD_REGISTRY.register()
class MatchMaskHead(MaskRCNNConvUpsampleHead):
    """detectron2's mask head; the mean runs over the positives of all processes."""

    def forward(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """X (Tensor[R, C, 14, 14]) -> the loss in training, instances with masks in inference."""
        result = super().forward(x, instances)
        if not self.training:
            return result
        share = len(x) / max(mean_over_ranks(len(x), x.device), 1.0)
        return {name: loss * share for name, loss in result.items()}


@ROI_HEADS_REGISTRY.register()
class MatchROIHeads(StandardROIHeads):
    """StandardROIHeads with ``MatchOutputLayers`` and the original's count of negatives by key."""

    @configurable
    def __init__(self, *, negatives: str, **kwargs: Any):
        """Add to detectron2's arguments.

        Args:
            negatives: "fill" up to the batch size, or "proportional" to the positives:
                int(positives / fraction) - positives, so none without a positive (spec 2.6).
        """
        super().__init__(**kwargs)
        if negatives not in NEGATIVE_RULES:
            raise ValueError(f"MATCH.NEGATIVES must be one of {NEGATIVE_RULES}, got {negatives!r}")
        self.negatives = negatives

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read the keys."""
        return {**super().from_config(cfg, input_shape), "negatives": cfg.MODEL.MATCH.NEGATIVES}

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts = super()._init_box_head(cfg, input_shape)
        parts["box_predictor"] = MatchOutputLayers(cfg, parts["box_head"].output_shape)
        parts["box_pooler"].canonical_box_size = cfg.MODEL.MATCH.CANONICAL_BOX_SIZE
        return parts

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts = super()._init_mask_head(cfg, input_shape)
        if parts:
            parts["mask_pooler"].canonical_box_size = cfg.MODEL.MATCH.CANONICAL_BOX_SIZE
        return parts

    def _sample_proposals(
        self, matched_idxs: Tensor, matched_labels: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.negatives == "fill":
            return super()._sample_proposals(matched_idxs, matched_labels, gt_classes)
        background = self.num_classes
        labels = torch.full_like(matched_idxs, background)
        if len(gt_classes):
            labels = torch.where(matched_labels == 1, gt_classes[matched_idxs], background)
        positives, _ = subsample_labels(
            labels, self.batch_size_per_image, self.positive_fraction, background
        )
        wanted = int(len(positives) / self.positive_fraction) - len(positives)
        _, negatives = subsample_labels(labels, wanted, 0.0, background)
        sampled = torch.cat([positives, negatives])
        return sampled, labels[sampled]
