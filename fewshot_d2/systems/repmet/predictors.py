"""What predictors with exchangeable classes share, and the simplest of them, the linear one of baseline-FT.

Shapes: R ROIs, C features of the box head, N trained classes, K classes of an episode. Background is the last column,
as in detectron2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Instances
from torch import Tensor, nn

from ...modeling.losses import hardest_rois
from ...modeling.soft_nms import batched_soft_nms


class EpisodicOutputLayers(FastRCNNOutputLayers):
    """detectron2's predictor with exchangeable classes, losses on the hardest ROIs and class-agnostic boxes.

    ``forward(x)`` gives the scores of the trained classes, ``forward(x, episode)`` those of an episode's, whose
    tensors ``episode_tensors`` makes of its supports' ROIs. Scores are a system's own; a subclass turns them into
    ``class_losses`` and ``probabilities``.
    """

    # Whether training leaves everything else in the detector as it is.
    trains_embedding_only = False

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, hard_rois: int, soft_nms_sigma: float, **kwargs: Any
    ):
        """Add to detectron2's arguments.

        Args:
            hard_rois: ROIs an image that count in the losses, and what sums over them are divided by.
            soft_nms_sigma: of a Gaussian Soft-NMS after the hard one; 0 = none.
        """
        super().__init__(input_shape, **kwargs)
        if hard_rois < 1:
            raise ValueError(f"REPMET.HARD_ROIS must be at least 1, got {hard_rois}")
        self.hard_rois, self.soft_nms_sigma = hard_rois, soft_nms_sigma
        # From the box head's features to the space that classes are told apart in.
        self.embedding: nn.Module = nn.Identity()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the keys."""
        return {
            **super().from_config(cfg, input_shape),
            "hard_rois": cfg.MODEL.REPMET.HARD_ROIS,
            "soft_nms_sigma": cfg.MODEL.REPMET.SOFT_NMS_SIGMA,
        }

    @property
    def last_layer(self) -> nn.Module | None:
        """The layer that an episode tunes with its classes; None where it is the last one of the box head."""
        return None if isinstance(self.embedding, nn.Identity) else self.embedding

    def class_losses(self, scores: Any, labels: Tensor) -> Tensor:
        """Tensor[R] of scores and labels (Tensor[R], background = number of columns - 1)."""
        raise NotImplementedError

    def other_losses(
        self, scores: Any, labels: Tensor, weights: Tensor, foreground: Tensor
    ) -> dict[str, Tensor]:
        """Further losses of a system; ``weights`` and ``foreground`` as in ``losses``."""
        return {}

    def probabilities(self, scores: Any) -> Tensor:
        """Tensor[R, K + 1]."""
        raise NotImplementedError

    def losses(
        self, predictions: tuple[Any, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """Losses of the hardest ROIs by class and box loss (spec 1.4, 1.5).

        Class losses are means over them, image by image; box losses are sums over the foreground among them, divided
        by ``hard_rois``. Both are averaged over the images.
        """
        scores, deltas = predictions
        labels = torch.cat([p.gt_classes for p in proposals])
        class_losses = self.class_losses(scores, labels)
        is_foreground = labels < self.background_label(scores)
        box_losses = self.box_losses(deltas, proposals) * is_foreground
        counts = [len(p) for p in proposals]
        kept = hardest_rois((class_losses + box_losses).detach(), counts, self.hard_rois)
        num_kept = torch.tensor([float(part.sum()) for part in kept.split(counts)])
        weights = torch.repeat_interleave(
            1 / num_kept.clamp(min=1) / len(proposals), torch.tensor(counts)
        )
        weights = kept * weights.to(labels.device)
        foreground = (kept & is_foreground) / (self.hard_rois * len(proposals))
        return {
            "loss_cls": (class_losses * weights).sum() * self.loss_weight.get("loss_cls", 1.0),
            "loss_box_reg": (box_losses * foreground).sum()
            * self.loss_weight.get("loss_box_reg", 1.0),
            **self.other_losses(scores, labels, weights, foreground),
        }

    def background_label(self, scores: Any) -> int:
        """The label of background, which follows those of all classes that compete."""
        raise NotImplementedError

    def box_losses(self, deltas: Tensor, proposals: list[Instances]) -> Tensor:
        """Tensor[R]: smooth L1 summed over the four numbers; meaningful for foreground only."""
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        # An image without ground truth has none to regress to, and no foreground either.
        targets = [p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes for p in proposals]
        wanted = self.box2box_transform.get_deltas(boxes, torch.cat([t.tensor for t in targets]))
        if not self.smooth_l1_beta:
            return F.l1_loss(deltas, wanted, reduction="none").sum(dim=1)
        losses = F.smooth_l1_loss(deltas, wanted, beta=self.smooth_l1_beta, reduction="none")
        return losses.sum(dim=1)

    def predict_probs(
        self, predictions: tuple[Any, Tensor], proposals: list[Instances]
    ) -> tuple[Tensor, ...]:
        """Probabilities, image by image: Tensor[Ri, K + 1]."""
        return self.probabilities(predictions[0]).split([len(p) for p in proposals])

    def inference(
        self, predictions: tuple[Any, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """detectron2's inference, with Soft-NMS on what its hard NMS leaves, by key (spec 2.2)."""
        if not self.soft_nms_sigma:
            return super().inference(predictions, proposals)
        results, rois = fast_rcnn_inference(
            self.predict_boxes(predictions, proposals),
            self.predict_probs(predictions, proposals),
            [p.image_size for p in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            -1,
        )
        kept = [self._softened(result) for result in results]
        return [r for r, _ in kept], [roi[keep] for roi, (_, keep) in zip(rois, kept, strict=True)]

    def _softened(self, result: Instances) -> tuple[Instances, Tensor]:
        keep, scores = batched_soft_nms(
            result.pred_boxes.tensor,
            result.scores,
            result.pred_classes,
            method="gaussian",
            sigma=self.soft_nms_sigma,
            min_score=0.0,
        )
        limit = self.test_topk_per_image if self.test_topk_per_image >= 0 else None
        keep, scores = keep[:limit], scores[:limit]
        result = result[keep]
        result.scores = scores
        return result, keep


class LinearOutputLayers(EpisodicOutputLayers):
    """A standard linear classifier, of which each episode trains the rows of its classes (baseline-FT, paper 5.2)."""

    def forward(self, x: Tensor, episode: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """X (Tensor[R, C]) -> logits (Tensor[R, K + 1]) and box deltas (Tensor[R, 4])."""
        x = x.flatten(start_dim=1)
        logits = self.cls_score(x)
        if episode is not None:
            rows = episode["rows"]
            logits = torch.cat([F.linear(x, rows[:, :-1], rows[:, -1]), logits[:, -1:]], dim=1)
        return logits, self.bbox_pred(x)

    @property
    def last_layer(self) -> nn.Module:
        """The classifier: background's row is tuned with those of the episode."""
        return self.cls_score

    def background_label(self, scores: Tensor) -> int:
        """K, the last column."""
        return scores.shape[1] - 1

    def class_losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each ROI."""
        return F.cross_entropy(scores, labels, reduction="none")

    def probabilities(self, scores: Tensor) -> Tensor:
        """Softmax."""
        return scores.softmax(dim=1)

    def trained_tensors(self) -> dict[str, Tensor]:
        """The trained classes as an episode's: {"rows": Tensor[N, C + 1]}, weights and bias."""
        rows = torch.cat([self.cls_score.weight, self.cls_score.bias[:, None]], dim=1)
        return {"rows": rows[: self.num_classes]}

    def episode_tensors(self, rois: list[Tensor], num_shots: list[int]) -> dict[str, Tensor]:
        """Rows as of a new layer; only fine-tuning tells the classes apart. The same ones for every episode."""
        generator = torch.Generator().manual_seed(0)
        rows = 0.01 * torch.randn(len(rois), self.cls_score.in_features + 1, generator=generator)
        rows[:, -1] = 0
        return {"rows": rows.to(self.cls_score.weight)}
