"""Soft-NMS (Bodla et al.): overlapping boxes lose score instead of being removed. torchvision has none."""

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

METHODS = ("gaussian", "linear")


def soft_nms(boxes: Tensor, scores: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """``batched_soft_nms`` of boxes (Tensor[R, 4]) of one class; ``options`` are its own."""
    class_ids = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    return batched_soft_nms(boxes, scores, class_ids, **options)


def batched_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor,
    *,
    method: str,
    sigma: float = 0.6,
    iou_threshold: float = 0.3,
    min_score: float = 0.001,
) -> tuple[Tensor, Tensor]:
    """Decay the scores of boxes that overlap a better one of their class; all classes side by side.

    Each round takes the best box that is left of every class, by its score as decayed so far, and multiplies the
    scores of the others by exp(-IoU^2 / sigma), or by 1 - IoU where the IoU is above ``iou_threshold``.

    Args:
        boxes (Tensor[R, 4]): XYXY. scores (Tensor[R]). class_ids (Tensor[R]): integers.
        method: "gaussian" or "linear". sigma: of the first. iou_threshold: of the second.
        min_score: boxes that fall below are dropped; 0 drops none.

    Returns:
        int64 Tensor[D], indices of the kept boxes by decreasing final score, and float32 Tensor[D], those scores.

    Raises:
        ValueError: unknown method, or a score that is not a number.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if torch.isnan(scores).any():
        raise ValueError("scores must be numbers, got NaN")
    index = _by_class(class_ids)
    is_left = index >= 0
    boxes, final = boxes.float()[index], scores.float()[index]
    rows = torch.arange(len(index), device=index.device)
    for _ in range(index.shape[1]):
        best = final.masked_fill(~is_left, -torch.inf).argmax(dim=1)
        is_left[rows, best] = False
        overlaps = _box_iou_rows(boxes[rows, best], boxes)
        if method == "gaussian":
            decay = torch.exp(-(overlaps**2) / sigma)
        else:
            decay = torch.where(overlaps > iou_threshold, 1 - overlaps, 1.0)
        final = torch.where(is_left, final * decay, final)
    kept = (index >= 0) & (final >= min_score)
    order = final[kept].argsort(descending=True, stable=True)
    return index[kept][order], final[kept][order]


def _by_class(class_ids: Tensor) -> Tensor:
    """int64 Tensor[C, n]: the positions of each class's boxes, filled up with -1."""
    _, row, counts = class_ids.unique(return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    index = order.new_full((len(counts), int(counts.max()) if len(counts) else 0), -1)
    column = torch.arange(len(order), device=order.device) - starts[row[order]]
    index[row[order], column] = order
    return index


def _box_iou_rows(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of the c-th box (Tensor[C, 4]) with every box of the c-th row (Tensor[C, n, 4]): Tensor[C, n]."""
    overlaps = torch.vmap(lambda box, row: box_iou(box[None], row)[0])(boxes, others)
    # 0 / 0 of two boxes without an area.
    return overlaps.nan_to_num(nan=0.0)
