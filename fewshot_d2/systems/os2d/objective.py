"""What OS2D is trained with: labels of places, and the losses of scores and boxes (paper 4; spec 1.11 and 1.12)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...modeling.losses import contrastive_loss, hinges, ranked_list_loss
from .matchers import Matches
from .targets import POSITIVE, GroundTruth, assign, localization_losses

LOSSES = ("ranked_list", "contrastive")


@dataclass
class Targets:
    """Of the n places of one query for its K classes.

    Attributes:
        labels (int64[K, n]): what the scores should be: 1, 0, or -1 = ignored. of_anchors (int64[K, n]): the same by
            the anchors; boxes are learned where it is 1. boxes (Tensor[K, n, 4]): the wanted ones there.
    """

    labels: Tensor
    of_anchors: Tensor
    boxes: Tensor

    @staticmethod
    def joined(parts: Sequence["Targets"]) -> "Targets":
        """Of all places of several queries, one after another: tensors with one axis for classes and places."""
        return Targets(
            torch.cat([part.labels.flatten() for part in parts]),
            torch.cat([part.of_anchors.flatten() for part in parts]),
            torch.cat([part.boxes.flatten(0, 1) for part in parts]),
        )


@dataclass(frozen=True)
class Objective:
    """Losses by key.

    Attributes:
        loss: one of ``LOSSES``. margins: of positives and negatives. negatives_per_positive: contrastive.
        negative_weight, localization_weight: of the losses of negatives and of boxes.
        iou_thresholds: of anchors. remap_thresholds: of predicted boxes; None = scores learn by the anchors' labels.
    """

    loss: str
    margins: tuple[float, float]
    negatives_per_positive: int
    negative_weight: float
    localization_weight: float
    iou_thresholds: tuple[float, float]
    remap_thresholds: tuple[float, float] | None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"MODEL.OS2D.LOSS must be one of {LOSSES}, got {self.loss!r}")

    def targets(self, boxes: Tensor, anchors: Tensor, truth: GroundTruth) -> Targets:
        """Label the places of one query.

        Args:
            boxes (Tensor[K, n, 4]): predicted. anchors (Tensor[n, 4]).
        """
        of_anchors, position = assign(anchors.expand_as(boxes), truth, self.iou_thresholds)
        labels = of_anchors
        if self.remap_thresholds is not None:
            labels, _ = assign(boxes.detach().float(), truth, self.remap_thresholds)
        wanted = truth.boxes[position] if len(truth.boxes) else torch.zeros_like(boxes)
        return Targets(labels, of_anchors, wanted)

    def losses(
        self,
        matches: Sequence[Matches],
        targets: Sequence[Targets],
        anchors: Sequence[Tensor],
        classes: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            matches, targets, anchors: of each query; maps may differ in size.
            classes (each int64[K], on the CPU): numbers from 0 on, the same for a class in all queries.
        """
        labels = torch.cat([t.labels.flatten() for t in targets])
        positive, negative = hinges(
            torch.cat([m.scores.flatten() for m in matches]),
            torch.cat([m.fixed_scores.flatten() for m in matches]),
            labels,
            self.margins,
        )
        if self.loss == "contrastive":
            first, second = contrastive_loss(
                positive, negative, labels, negatives_per_positive=self.negatives_per_positive
            )
        else:
            device, counts = labels.device, [m.scores.shape[1] for m in matches]
            of_places = [
                c.to(device).repeat_interleave(n) for c, n in zip(classes, counts, strict=True)
            ]
            # Known without asking the device.
            number = max((int(c.max()) + 1 for c in classes if len(c)), default=0)
            first, second = ranked_list_loss(
                positive, negative, labels, torch.cat(of_places), num_classes=number
            )
        losses = {"loss_positive": first, "loss_negative": self.negative_weight * second}
        if self.localization_weight:
            of_boxes = self.localization(
                torch.cat([m.boxes.flatten(0, 1) for m in matches]),
                torch.cat(
                    [
                        a.expand_as(t.boxes).flatten(0, 1)
                        for a, t in zip(anchors, targets, strict=True)
                    ]
                ),
                Targets.joined(targets),
            )
            losses["loss_box"] = self.localization_weight * of_boxes.sum() / max(len(of_boxes), 1)
        return losses

    @staticmethod
    def localization(boxes: Tensor, anchors: Tensor, targets: Targets) -> Tensor:
        """Losses (Tensor[B]) of the boxes whose anchors are positive, in the order of ``nonzero``.

        Args:
            boxes, anchors (Tensor[..., 4]): like the boxes of the targets.
        """
        chosen = (targets.of_anchors == POSITIVE).flatten().nonzero()[:, 0]
        # Gradients of rows of a matrix are added up without sorting.
        rows = (t.flatten(0, -2).index_select(0, chosen) for t in (boxes, anchors, targets.boxes))
        return localization_losses(*rows)
